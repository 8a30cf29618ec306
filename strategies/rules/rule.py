"""The contract of an aggregation rule.

A rule says what a node trains, what it sends, how the server merges it, and what a node starts from next. It is a
frozen object of hyperparameters with pure methods over tensors: server and nodes build the same rule from the same
run config, and nothing of Flower, PEFT or a model is known here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from common.adapter import draws
from common.adapter.algebra import chosen_blocks, leading
from common.adapter.limits import HEAVIEST
from common.adapter.threads import one_thread
from common.adapter.values import (
    FACTORS,
    HEAD,
    Key,
    Spec,
    State,
    Tensors,
    Update,
    check_shapes,
    check_values,
)
from common.error import BouquetError
from strategies.mean import Mean, WeightedMean
from strategies.optimizer import ServerOptimizer

CHANGE_RANK = "Change lora-rank in --node-config, or lora.rank in the run config."


@dataclass(frozen=True)
class Plan:
    """The parts of a layer that are trained in a round, and those that are sent."""

    trained: frozenset[str]
    sent: frozenset[str]


class Formulas(NamedTuple):
    """What a message of one layer costs, from a node and to it, as ``Rule.bytes_up`` has it."""

    up: str
    down: str


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One published aggregation rule.

    ``head`` says what becomes of a classification head, and ``offset_energy`` how much of an offset that has passed
    the break-even rank is kept (1: all of it); both mean the same for every rule.
    """

    head: Literal["shared", "local", "frozen"] = "shared"
    offset_energy: float = 1.0

    name: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool]
    """Every node starts the next round from the weighted mean of the nodes' models."""
    linear: ClassVar[bool]
    """The server needs nothing but a weighted mean of what is sent."""
    mixed_ranks: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    constant: ClassVar[frozenset[str]] = frozenset()
    """Parts of the state that never change after the start."""
    relative: ClassVar[bool] = False
    """What is sent is a difference from what was received."""
    reframes: ClassVar[bool] = False
    """The server gives the nodes other factors than a mean of theirs: what a node kept back of one round means
    nothing in the next."""
    scattered: ClassVar[bool] = False
    """Nodes of a smaller rank work with slots that are drawn anew for each node and round."""
    learning_rate: ClassVar[float] = 5e-3
    """What the nodes train at where the run config names no rate: one at which the default rounds learn."""
    bytes_up: ClassVar[str] = "b*r*f"
    """What a node sends of a layer: b bytes a value, r the rank, f = d_in + d_out, K nodes, t rounds done."""
    bytes_down: ClassVar[str] = "b*r*f"

    @property
    def formulas(self) -> Formulas:
        """What a message costs with the hyperparameters that the rule has."""
        return Formulas(self.bytes_up, self.bytes_down)

    @property
    def blocks(self) -> int:
        """Square blocks of the core between the factors; 0 for a rule without one."""
        return 0

    @property
    def settled(self) -> int:
        """The round from which on the constant parts are constant."""
        return 0

    @property
    def shrinks(self) -> bool:
        """Whether the size of what a node sends depends on what it learned."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether the rule is exact with the hyperparameters that it has."""
        return self.exact and self.offset_energy == 1

    def plan(self, round: int) -> Plan:
        """What is trained and sent in ``round``, counted from 0."""
        return Plan(trained=FACTORS, sent=FACTORS)

    def initial(self, spec: Spec, seed: int) -> State:
        """The shared start, drawn from ``seed``: A uniform as in PEFT (kaiming, a = sqrt 5), B zero, a normal head.

        A core, where there is one, starts at zero, and what multiplies its blocks at one.
        """
        generator = torch.Generator().manual_seed(seed)
        adapter: Tensors = {}
        for key, shape in spec.factor_shapes().items():
            if key.part == "A":
                adapter[key] = draws.uniform(shape, 1 / math.sqrt(shape[1]), generator)
            else:
                adapter[key] = torch.ones(shape) if key.part == "s" else torch.zeros(shape)
        for key, shape in spec.head.items():
            if len(shape) > 1:
                adapter[key] = draws.normal(shape, 0.02, generator)
            else:  # a norm's weight, or a bias
                adapter[key] = torch.ones(shape) if key.part == "W" else torch.zeros(shape)
        return State(adapter, spec.scale, seed=seed)

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

    def install(self, state: State, private: Tensors) -> Tensors:
        """Where a node starts: the state's tensors, over them what the node kept for itself."""
        return {**state.adapter, **private}

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
        return self.head != "frozen" if key.part in HEAD else key.part in self.plan(round).trained

    @final
    def sends(self, round: int, key: Key) -> bool:
        """Whether a tensor is sent in ``round``."""
        return self.head == "shared" if key.part in HEAD else key.part in self.plan(round).sent

    @final
    def keeps(self, round: int, key: Key) -> bool:
        """Whether a node keeps a tensor for itself: its own head, or what is personal of the factors."""
        return (self.personal or key.part in HEAD) and self.trains(round, key) and not self.sends(round, key)

    @property
    def drawn(self) -> frozenset[str]:
        """Parts that each side draws for itself with :meth:`draw`, so that they never travel to the nodes."""
        return self.fixed

    def draw(self, spec: Spec, seed: int, round: int) -> Tensors:
        """The drawn parts of the state of ``round``: those of the start, unless the rule draws anew."""
        return {key: tensor for key, tensor in self.initial(spec, seed).adapter.items() if key.part in self.drawn}

    @final
    @property
    def fixed(self) -> frozenset[str]:
        """The constant parts, the head among them where it is not shared; none travels more than once."""
        return self.constant if self.head == "shared" else self.constant | HEAD

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
        sent = self.plan(state.round).sent | (HEAD if self.head == "shared" else frozenset())
        expected = {
            key: tuple(chosen_blocks(key, tensor, update.slots).shape)
            for key, tensor in state.adapter.items()
            if key.part in sent
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
        count, most = (len(update.slots), self.blocks) if self.blocks else (update.rank, state.rank)
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

    @final
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """The state of the next round. Takes updates one at a time; a linear rule holds no more than one.

        Raises :class:`BouquetError` on an update that breaks the contract, or where there is none.
        """
        with one_thread():
            merged = self.merge(state, self._checked(state, updates))
        return replace(merged, round=state.round + 1)

    def _demand(self, field: str, valid: bool, expected: str) -> None:
        """Raise :class:`BouquetError` unless a hyperparameter is valid."""
        if not valid:
            where = f"rule.{self.name}.{field.replace('_', '-')}"
            raise BouquetError("a value out of range", where=where, expected=expected, got=str(getattr(self, field)))

    def _checked(self, state: State, updates: Iterable[Update]) -> Iterator[Update]:
        empty = True
        for update in updates:
            empty = False
            self.check(state, update)
            yield update
        if empty:
            raise BouquetError("a round without updates", expected="at least one update", got="none")


@dataclass(frozen=True, kw_only=True)
class MeanRule(Rule):
    """A rule whose server only averages what is sent."""

    mean: Mean = field(default_factory=WeightedMean)
    optimizer: ServerOptimizer | None = None

    linear = True

    @property
    def is_exact(self) -> bool:
        """Only a plain weighted mean can be."""
        return super().is_exact and self.mean == WeightedMean() and self.optimizer is None

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """Every sent tensor becomes ``sum_k p_k x_k`` with ``p_k = weight_k / sum_j weight_j``, or goes towards it."""
        mean = self.average(state, updates)
        if self.optimizer is not None:
            return self.optimizer.step(state, mean)
        return replace(state, adapter={**state.adapter, **mean})

    def average(self, state: State, updates: Iterable[Update]) -> Tensors:
        """The mean of every tensor that is sent."""
        return self.mean((update.weight, update.tensors) for update in updates)
