"""Rules that stack the nodes' factors into the ideal update, and divide it."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.adapter.algebra import extend_offset, weighted_mean
from common.adapter.draws import kaiming, layer_seed
from common.adapter.threads import each
from common.adapter.values import HEAD, Key, LayerShape, State, Tensors, Update
from strategies.rules.rule import Rule


class Stack(NamedTuple):
    """The ideal update ``left @ right`` of one layer, all nodes' slots side by side: R of them.

    ``left`` is ``d_out x R``; ``right`` is ``R x d_in`` and holds the scales and the weights; ``share`` is the weight
    of each slot, for most rules its node's p_k.
    """

    left: Tensor
    right: Tensor
    share: Tensor

    @property
    def shape(self) -> LayerShape:
        """The layer's size."""
        return LayerShape(self.left.shape[0], self.right.shape[1])


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

    mixed_ranks = True
    reframes = True

    @abstractmethod
    def split(self, stack: Stack, rank: int, scale: float, seed: int) -> Split:
        """Divide the ideal update of one layer.

        The factors to go on from have rank ``rank`` and count ``scale`` times. ``seed`` is for what is drawn anew.
        """

    def shares(self, replies: Sequence[Update]) -> list[Tensor]:
        """What each node's slots count in the ideal update, float64: all of them what the node does."""
        total = sum(reply.weight for reply in replies)
        return [torch.full((reply.rank,), reply.weight / total, dtype=torch.float64) for reply in replies]

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """Stack every layer (the weights on A alone), divide it, and average the head."""
        replies = list(updates)
        shares = self.shares(replies)
        heads = [(r.weight, {key: t for key, t in r.tensors.items() if key.part in HEAD}) for r in replies]
        adapter = {**state.adapter, **weighted_mean(heads)}

        def divided(layer: str) -> Split:
            a, b = Key(layer, "A"), Key(layer, "B")
            left = torch.cat([reply.tensors[b] for reply in replies], dim=1)
            slots = [(share[: len(r.tensors[a])], r) for share, r in zip(shares, replies, strict=True)]
            right = torch.cat([(share * r.scale).float()[:, None] * r.tensors[a] for share, r in slots], dim=0)
            stack = Stack(left, right, torch.cat([share for share, _ in slots]).float())
            seed = layer_seed(state.seed, state.round + 1, layer)
            return self.split(stack, len(state.adapter[a]), state.scale, seed)

        kept: Tensors = {}
        for layer, split in zip(state.layers(), each(state.layers(), divided), strict=True):
            adapter[Key(layer, "A")], adapter[Key(layer, "B")] = split.a, split.b
            if split.q is not None and split.p is not None and split.q.shape[1]:
                kept[Key(layer, "Q")], kept[Key(layer, "P")] = split.q, split.p
        return replace(state, adapter=adapter, offset=extend_offset(state.offset, kept, self.offset_energy))


@dataclass(frozen=True, kw_only=True)
class RestartRule(StackRule):
    """A rule that puts what it keeps into the offset, and has the nodes start again from A fresh and B = 0."""

    restarts = True

    def growth(self, nodes: int, rank: int) -> int:
        """All directions of the stack."""
        return nodes * rank

    @abstractmethod
    def kept(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """What of the ideal update of a layer joins the offset: Q (``d_out x q``) and P (``q x d_in``)."""

    def split(self, stack: Stack, rank: int, scale: float, seed: int) -> Split:
        """Nothing to go on from, and what is kept."""
        return Split(*fresh(stack.shape, rank, seed), *self.kept(stack))


def fresh(shape: LayerShape, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """B and A for a new start of a layer: B zero, A as PEFT draws it."""
    return torch.zeros(shape.d_out, rank), kaiming(rank, shape.d_in, torch.Generator().manual_seed(seed))


def revived(b: Tensor, a: Tensor, seed: int) -> Tensor:
    """A with the rows of a new start in slots where both factors are zero, which no gradient would ever reach.

    The product stays, as B is zero there.
    """
    _, drawn = fresh(LayerShape(b.shape[0], a.shape[1]), len(a), seed)
    alive = a.any(dim=1) | b.any(dim=0)
    return torch.where(alive[:, None], a, drawn)


def padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors with zero slots up to ``rank``, where the layer or the stack has fewer directions."""
    missing = rank - b.shape[1]
    return pad(b, (0, missing)), pad(a, (0, 0, 0, missing))
