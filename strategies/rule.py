"""The contract of an aggregation rule.

A rule says what a node trains, what it sends, how the server merges it, and what a node starts from next. It is a
frozen object of hyperparameters with pure methods over tensors: server and nodes build the same rule from the same
run config, and nothing of Flower, PEFT or a model is known here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.adapter import (
    FACTORS,
    HEAD,
    Key,
    Spec,
    State,
    Tensors,
    Update,
    all_finite,
    check_shapes,
    extend_offset,
    leading,
    weighted_mean,
)
from common.error import BouquetError


@dataclass(frozen=True)
class Plan:
    """The parts of a layer that are trained in a round, and those that are sent."""

    trained: frozenset[str]
    sent: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One published aggregation rule. ``head`` says what becomes of a classification head, the same for every rule."""

    head: Literal["shared", "local", "frozen"] = "shared"

    name: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool]
    """Every node starts the next round from the weighted mean of the nodes' models."""
    linear: ClassVar[bool]
    """The server needs nothing but a weighted mean of what is sent."""
    mixed_ranks: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    seeded: ClassVar[frozenset[str]] = frozenset()
    """Parts that stay as :meth:`initial` drew them: each side draws them, they never travel."""

    def plan(self, round: int) -> Plan:
        """What is trained and sent in ``round``, counted from 0."""
        return Plan(trained=FACTORS, sent=FACTORS)

    def initial(self, spec: Spec, seed: int) -> State:
        """The shared start, drawn from ``seed``: A uniform as in PEFT (kaiming, a = sqrt 5), B zero, a normal head."""
        generator = torch.Generator().manual_seed(seed)
        adapter: Tensors = {}
        for key, shape in spec.factor_shapes().items():
            if key.part == "A":
                bound = 1 / math.sqrt(shape[1])
                adapter[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            else:
                adapter[key] = torch.zeros(shape)
        for key, shape in spec.head.items():
            adapter[key] = torch.zeros(shape)
            if key.part == "W":
                adapter[key].normal_(std=0.02, generator=generator)
        return State(adapter, spec.scale)

    def view(self, state: State, rank: int) -> State:
        """What a node of this rank works with: the leading slots of A and B. Idempotent.

        Raises :class:`BouquetError` for another rank than the state's where the rule needs one rank, or for a larger.
        """
        if rank == state.rank:
            return state
        if not self.mixed_ranks or rank > state.rank:
            raise BouquetError(
                f"a rank that the rule '{self.name}' cannot serve",
                where="lora-rank",
                expected=f"at most {state.rank}" if self.mixed_ranks else f"{state.rank} on every node",
                got=str(rank),
                cure="Change lora-rank in --node-config, or lora.rank in the run config.",
            )
        return replace(state, adapter={key: leading(key, tensor, rank) for key, tensor in state.adapter.items()})

    def install(self, state: State, private: Tensors) -> Tensors:
        """Where a node starts: the state's tensors, over them what the node kept for itself."""
        return {**state.adapter, **private}

    def send(self, received: State, local: Tensors) -> Tensors:
        """What leaves the machine."""
        return {key: tensor for key, tensor in local.items() if self.sends(received.round, key)}

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
        """Whether a node keeps a tensor for itself: trained, but not sent."""
        return self.trains(round, key) and not self.sends(round, key)

    @final
    @property
    def drawn(self) -> frozenset[str]:
        """Parts that each side draws for itself with :meth:`initial`."""
        return self.seeded if self.head == "shared" else self.seeded | HEAD

    @final
    def check(self, state: State, update: Update) -> None:
        """Raise :class:`BouquetError` unless a node of this rule could have made ``update`` from ``state``."""
        if self.mixed_ranks:
            state = self.view(state, min(update.rank or state.rank, state.rank))
        expected = {key: tuple(value.shape) for key, value in state.adapter.items() if self.sends(state.round, key)}
        check_shapes(update.tensors, expected, f"an update does not fit the rule '{self.name}'")
        for key, tensor in update.tensors.items():
            if not all_finite(tensor):
                raise BouquetError(
                    "an update is not finite", where=str(key), expected="finite values", got="NaN or infinity"
                )
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise BouquetError("an update has no weight", expected="a positive, finite weight", got=str(update.weight))
        if update.scale != state.scale:
            raise BouquetError("an update has another scale", expected=str(state.scale), got=str(update.scale))

    @final
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """The state of the next round. Takes updates one at a time; a linear rule holds no more than one.

        Raises :class:`BouquetError` on an update that breaks the contract, or where there is none.
        """
        return replace(self.merge(state, self._checked(state, updates)), round=state.round + 1)

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

    linear = True

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """Every sent tensor becomes ``sum_k p_k x_k`` with ``p_k = weight_k / sum_j weight_j``."""
        mean = weighted_mean((update.weight, update.tensors) for update in updates)
        return replace(state, adapter={**state.adapter, **mean})


class Split(NamedTuple):
    """How one layer's ideal update is divided: factors to go on from, and a part Q P to keep as it is."""

    b: Tensor
    a: Tensor
    q: Tensor | None = None
    p: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StackRule(Rule):
    """A rule that starts from the ideal update ``sum_k p_k s_k B_k A_k``, as stacked factors, and divides it.

    The stack has the rank of all nodes together, so the nodes' ranks may differ.
    """

    linear = False
    mixed_ranks = True

    @abstractmethod
    def split(self, left: Tensor, right: Tensor, rank: int, scale: float, seed: int) -> Split:
        """Divide the ideal update ``left @ right`` (``d_out x R``, ``R x d_in``) of one layer.

        The factors to go on from have rank ``rank`` and count ``scale`` times. ``seed`` is for what is drawn anew.
        """

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """Stack every layer (the weights on A alone), divide it, and average the head."""
        replies = list(updates)
        total = sum(reply.weight for reply in replies)
        heads = [(r.weight, {key: t for key, t in r.tensors.items() if key.part in HEAD}) for r in replies]
        adapter = {**state.adapter, **weighted_mean(heads)}
        kept: Tensors = {}
        for number, layer in enumerate(state.layers()):
            a, b = Key(layer, "A"), Key(layer, "B")
            left = torch.cat([reply.tensors[b] for reply in replies], dim=1)
            right = torch.cat([reply.weight / total * reply.scale * reply.tensors[a] for reply in replies], dim=0)
            split = self.split(left, right, state.rank, state.scale, seed=(state.round + 1) * 2**20 + number)
            adapter[a], adapter[b] = split.a, split.b
            if split.q is not None and split.p is not None and split.q.shape[1]:
                kept[Key(layer, "Q")], kept[Key(layer, "P")] = split.q, split.p
        return replace(state, adapter=adapter, offset=extend_offset(state.offset, kept))


def fresh(left: Tensor, right: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A new start for the layer that ``left @ right`` updates: B zero, A drawn as in :meth:`Rule.initial`."""
    bound = 1 / math.sqrt(right.shape[1])
    a = torch.empty(rank, right.shape[1]).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(left.shape[0], rank), a


def padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors with zero slots up to ``rank``, where the layer or the stack has fewer directions."""
    missing = rank - b.shape[1]
    return pad(b, (0, missing)), pad(a, (0, 0, 0, missing))
