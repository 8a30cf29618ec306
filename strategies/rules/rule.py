"""The contract of an aggregation rule.

A rule says what a node trains, what it sends, how the server merges it, and what a node starts from next. It is a
frozen object of hyperparameters with pure methods over tensors: server and nodes build the same rule from the same
run config, and nothing of Flower, PEFT or a model is known here.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

from torch import Tensor

from common.adapter.algebra import leading
from common.adapter.limits import HEAVIEST
from common.adapter.lora import Lora
from common.adapter.structure import Structure
from common.adapter.threads import one_thread
from common.adapter.values import HEAD, Key, State, Tensors, Update, check_shapes, check_values
from common.error import BouquetError
from common.method import GIVEN, Method, given

CHANGE_RANK = "Change lora-rank in --node-config, or lora.rank in the run config."


@dataclass(frozen=True)
class Plan:
    """The parts of a layer that are trained in a round, and those that are sent."""

    trained: frozenset[str]
    sent: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Rule(Method):
    """One published aggregation rule.

    ``offset_energy`` is how much of an offset that has passed the break-even rank is kept (1: all of it); it means the
    same for every rule that has one. Which tensors of a head are trained and sent is not a rule's to say: it treats
    those that it is given as it treats what it averages.

    A long class: every question that a rule may be asked stands here, with the answer of most rules.
    """

    offset_energy: float = given(1.0)
    adapter: Structure = field(default_factory=Lora, metadata={GIVEN: True})

    section = "rule"
    keeps: ClassVar[str] = "nothing"
    """What a node keeps for itself, by the name of a member of that axis."""
    init: ClassVar[str] = ""
    """Where the adapter starts, by the name of a member of that axis; empty leaves that to the structure."""
    linear: ClassVar[bool] = False
    """The server needs nothing but a weighted mean of what is sent."""
    mixed_ranks: ClassVar[bool] = False
    relative: ClassVar[bool] = False
    """What is sent is a difference from what was received."""
    reframes: ClassVar[bool] = False
    """The server gives the nodes other factors than a mean of theirs: what a node kept back of one round means
    nothing in the next."""
    turns: ClassVar[bool] = False
    """A node turns its factors before it sends them, so that their mean is in another frame than it trained in."""
    restarts: ClassVar[bool] = False
    """Every round begins with factors that both sides draw anew; only the offset travels to the nodes."""
    scattered: ClassVar[bool] = False
    """Nodes of a smaller rank train slots that are drawn anew for each node and round."""
    gets_all: ClassVar[bool] = False
    """A node of a smaller rank gets the slots that it does not train, too, and computes with them."""
    learning_rate: ClassVar[float] = 0.0
    """What the nodes train at where the run config names no rate; 0 leaves that to the structure."""

    @classmethod
    def suits(cls, structure: Structure) -> bool:
        """Whether the rule's mathematics is that of such a structure: for most rules, a plain LoRA's."""
        return structure.plain

    @classmethod
    def goes_on(cls) -> bool:
        """Whether a round's factors are those that a node trained in the round before, moved."""
        return not (cls.reframes or cls.restarts or cls.turns or cls.mixed_ranks)

    @property
    def structure(self) -> Structure:
        """What the rule trains beside a frozen layer."""
        return self.adapter

    @property
    def start_at(self) -> str:
        """Where the adapter starts unless the run config names another init."""
        return self.init or self.structure.init

    @property
    def rate(self) -> float:
        """What the nodes train at unless the run config names a rate."""
        return self.learning_rate or self.structure.learning_rate

    @property
    def exact(self) -> bool:
        """Whether every node starts the next round from the weighted mean of the nodes' models."""
        return False

    @property
    def settled(self) -> int:
        """The round from which on the parts that are never sent are constant."""
        return 0

    @property
    def shrinks(self) -> str:
        """Where the size of what a node sends depends on what it learned, the setting by which it would not."""
        return ""

    @property
    def density(self) -> tuple[float, float]:
        """The share of the values that are not zero, from a node and to it, in messages that a rule makes sparse."""
        return 1.0, 1.0

    @property
    def thins(self) -> bool:
        """Whether a node starts from some of the factors' values, the others being zero."""
        return self.density[1] < 1

    def growth(self, nodes: int, rank: int) -> int:
        """By how many columns the offset grows at most in a round of so many nodes."""
        return 0

    @property
    def moves_offset(self) -> bool:
        """Whether a node ever receives another offset than that of the start."""
        return self.growth(2, 1) > 0

    def begin(self, state: State) -> State:
        """The state before the first round, from the start of the run's init."""
        return state

    def plan(self, round: int) -> Plan:
        """What is trained and sent in ``round``, counted from 0."""
        return Plan(trained=self.structure.trained, sent=self.structure.trained)

    def view(self, state: State, rank: int, draw: int = 0) -> State:
        """What a node of this rank works with: the leading slots of A and B. Idempotent.

        ``draw`` is a number that both sides know, for a choice that differs from node to node and from round to round.
        Raises :class:`BouquetError` for another rank than the state's where the rule needs one rank, or for a larger.
        """
        self.check_rank(rank, state.rank)
        if rank == state.rank:
            return state
        return replace(state, adapter={key: leading(key, tensor, rank) for key, tensor in state.adapter.items()})

    def check_rank(self, rank: int, whole: int, where: str = "lora-rank", cure: str = CHANGE_RANK) -> None:
        """Raise :class:`BouquetError` unless a node of this rank can take part where the state's is ``whole``.

        ``where`` and ``cure`` are for whoever knows more of them.
        """
        if rank == whole:
            return
        if not self.mixed_ranks or rank > whole:
            raise BouquetError(
                f"a rank that the rule '{self.name}' cannot serve",
                where=where,
                expected=f"at most {whole}" if self.mixed_ranks else f"{whole} on every node",
                got=str(rank),
                cure=cure,
            )

    def penalty(self, factors: Tensors) -> Tensor | None:
        """A term that the node adds to its loss, from the factors that it trains; None for most rules."""
        return None

    def next_rank(self, received: State, local: Tensors) -> int:
        """The rank that a node goes on with after a round, at most its own."""
        return received.rank

    def send(self, received: State, local: Tensors) -> Tensors:
        """What leaves the machine."""
        return {key: tensor for key, tensor in local.items() if self.sends(received.round, key)}

    def model(self, state: State, update: Update) -> State:
        """The model that a node had when it sent ``update``, having started from ``state`` or a view of it."""
        return replace(state, adapter={**self.view(state, update.rank or state.rank).adapter, **update.tensors})

    @abstractmethod
    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """The mathematics: the next model. ``updates`` are checked; the round is counted by :meth:`aggregate`."""

    @final
    def trains(self, round: int, key: Key) -> bool:
        """Whether a tensor is trained in ``round``."""
        return key.part in self.plan(round).trained | HEAD

    @final
    def sends(self, round: int, key: Key) -> bool:
        """Whether a tensor is sent in ``round``."""
        return key.part in self.plan(round).sent | HEAD

    @final
    def check(self, state: State, update: Update) -> None:
        """Raise :class:`BouquetError` unless a node of this rule could have made ``update`` from ``state``."""
        self.check_form(state, update)
        check_values(update.tensors, "an update")

    @final
    def check_form(self, state: State, update: Update) -> None:
        """:meth:`check` of all but the values, which need not have been read."""
        self._check_slots(state, update)
        if self.mixed_ranks:
            state = self.view(state, min(update.rank or state.rank, state.rank))
        expected = {
            key: tuple(self.structure.chosen(key, tensor, update.slots).shape)
            for key, tensor in state.adapter.items()
            if self.sends(state.round, key)
        }
        check_shapes(update.tensors, expected, f"an update does not fit the rule '{self.name}'")
        if not 0 < update.weight <= HEAVIEST:
            raise BouquetError(
                "an update has no weight", expected=f"more than 0, at most {HEAVIEST:g}", got=str(update.weight)
            )
        if update.scale != state.scale:
            raise BouquetError("an update has another scale", expected=str(state.scale), got=str(update.scale))

    def _check_slots(self, state: State, update: Update) -> None:
        if not update.slots:
            if self.scattered and update.rank not in (0, state.rank):
                raise BouquetError("an update does not say which slots it has", expected=f"{update.rank} slots")
            return
        count, most = self._slots(state, update)
        if not (len(set(update.slots)) == len(update.slots) == count):
            raise BouquetError(
                "an update names other slots than it has",
                expected=f"{count} different slots",
                got=", ".join(map(str, update.slots)),
            )
        if not all(0 <= slot < most for slot in update.slots):
            raise BouquetError(
                "an update names a slot that does not exist",
                expected=f"0 to {most - 1}",
                got=", ".join(str(slot) for slot in update.slots if not 0 <= slot < most),
            )

    def _slots(self, state: State, update: Update) -> tuple[int, int]:
        """How many slots an update that names some must have, and how many there are."""
        return update.rank, state.rank

    @final
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """The state of the next round. Takes updates one at a time; a linear rule holds no more than one.

        Raises :class:`BouquetError` on an update that breaks the contract, or where there is none.
        """
        with one_thread():
            merged = self.merge(state, self._checked(state, updates))
        return replace(merged, round=state.round + 1)

    def _checked(self, state: State, updates: Iterable[Update]) -> Iterator[Update]:
        empty = True
        for update in updates:
            empty = False
            self.check(state, update)
            yield update
        if empty:
            raise BouquetError("a round without updates", expected="at least one update", got="none")
