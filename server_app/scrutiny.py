"""A look at well-formed updates before they are merged: how large each change is, and whether it goes another way."""

from functools import lru_cache
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from common.adapter import Key, State, Update
from common.error import BouquetError
from strategies import Rule

BUCKETS = 4096
# Honest nodes measured 0.02 to 0.18, whatever their data; the sketch errs by 0.016; a flipped update is below 0.
AGAINST = -0.1
FEWEST = 4
"""So many changes have to be there before one is compared with the others' median."""


class Change(NamedTuple):
    """The norm of what a node has changed, and a sketch of its direction: ``BUCKETS`` signed sums."""

    norm: float
    sketch: Tensor


class Scrutiny:
    """The changes of one round. ``max_norm`` and ``max_ratio`` = 0 accept any.

    The sketch (a feature hash, arXiv:0902.2206) keeps cosines to about 1 / sqrt(BUCKETS) and needs no update to be
    kept, so that a rule may fold updates as they come.
    """

    def __init__(self, rule: Rule, state: State, max_norm: float, max_ratio: float = 0.0) -> None:
        self._rule = rule
        self._state = state
        self._max_norm = max_norm
        self._max_ratio = max_ratio
        self._changes: dict[str, Change] = {}

    def examine(self, node: str, update: Update) -> float:
        """The norm of a node's change. Raises :class:`BouquetError` if it is above the bound."""
        change = measure(self._rule, self._state, update)
        if self._max_norm and change.norm > self._max_norm:
            raise BouquetError(
                "an update that changes too much",
                where=node,
                expected=f"a norm of at most {self._max_norm:g} (round.max-norm)",
                got=f"{change.norm:.4g}",
            )
        self._changes[node] = change
        return change.norm

    def outsized(self) -> dict[str, str]:
        """Nodes that changed ``max_ratio`` times as much as the median of the others, and why each is refused."""
        if not self._max_ratio or len(self._changes) < FEWEST:
            return {}
        refused = {}
        for node, change in self._changes.items():
            usual = median(other.norm for name, other in self._changes.items() if name != node)
            if change.norm > self._max_ratio * usual > 0:
                refused[node] = (
                    f"an update that changes too much: expected a norm of at most {self._max_ratio:g} times the "
                    f"others' median, {usual:.4g} (round.max-ratio), got {change.norm:.4g}"
                )
        return refused

    def largest(self) -> str:
        """The node that has changed most, of those that are left."""
        return max(self._changes, key=lambda node: self._changes[node].norm)

    def forget(self, node: str) -> None:
        """Leave a node's change out of account."""
        del self._changes[node]

    def against(self) -> dict[str, float]:
        """Nodes whose change points against the sum of the others', with the cosine between the two."""
        if len(self._changes) < 2:
            return {}
        sketches = {node: self._changes[node].sketch for node in sorted(self._changes)}
        total = torch.stack(list(sketches.values())).sum(0)
        cosines = {node: float(cosine_similarity(sketch, total - sketch, dim=0)) for node, sketch in sketches.items()}
        return {node: cosine for node, cosine in cosines.items() if cosine < AGAINST}


def measure(rule: Rule, state: State, update: Update) -> Change:
    """The change from what the node had received to what it had when it sent."""
    received = state if update.slots else rule.view(state, update.rank or state.rank)
    sent = rule.model(state, update)
    parts = []
    for key in sorted(update.tensors):
        before, after = received.adapter.get(key), sent.adapter.get(key)
        if before is not None and after is not None and before.shape == after.shape:
            parts.append(_widened(key, after - before, state).flatten())
    change = torch.cat(parts) if parts else torch.zeros(1)
    squares = change.square().sum(dtype=torch.float64)
    whole = pad(change, (0, -len(change) % BUCKETS))
    return Change(float(squares.sqrt()), (whole * _signs(len(whole))).view(-1, BUCKETS).sum(0))


def _widened(key: Key, change: Tensor, state: State) -> Tensor:
    """The change of a node of a smaller rank at its place in the state's, so that those of all nodes lie alike."""
    whole = state.adapter[key].shape
    if change.shape == whole or change.ndim < 2:
        return change
    return pad(change, (0, whole[1] - change.shape[1], 0, whole[0] - change.shape[0]))


@lru_cache(maxsize=1)
def _signs(count: int) -> Tensor:
    """The sketch's signs, -1 or 1, the same for all nodes; drawn once, as they are half of its cost."""
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).float()
