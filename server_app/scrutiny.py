"""A look at well-formed updates before they are merged: how large each change is, and whether it goes another way."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from common.adapter import State, Update
from common.error import BouquetError
from strategies import Rule

BUCKETS = 4096
# Honest nodes measured 0.02 to 0.18, whatever their data; the sketch errs by 0.016; a flipped update is below 0.
AGAINST = -0.1


class Change(NamedTuple):
    """The norm of what a node has changed, and a sketch of its direction: ``BUCKETS`` signed sums."""

    norm: float
    sketch: Tensor


class Scrutiny:
    """The changes of one round. ``max_norm`` = 0 accepts any norm.

    The sketch (a feature hash, arXiv:0902.2206) keeps cosines to about 1 / sqrt(BUCKETS) and needs no update to be
    kept, so that a rule may fold updates as they come.
    """

    def __init__(self, rule: Rule, state: State, max_norm: float) -> None:
        self._rule = rule
        self._state = state
        self._max_norm = max_norm
        self._sketches: dict[str, Tensor] = {}

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
        self._sketches[node] = change.sketch
        return change.norm

    def against(self) -> dict[str, float]:
        """Nodes whose change points against the sum of the others', with the cosine between the two."""
        if len(self._sketches) < 2:
            return {}
        total = torch.stack(list(self._sketches.values())).sum(0)
        cosines = {
            node: float(cosine_similarity(sketch, total - sketch, dim=0)) for node, sketch in self._sketches.items()
        }
        return {node: cosine for node, cosine in cosines.items() if cosine < AGAINST}


def measure(rule: Rule, state: State, update: Update) -> Change:
    """The change from what the node had received to what it had when it sent."""
    received = state if update.slots else rule.view(state, update.rank or state.rank)
    sent = rule.model(state, update)
    squares, sketch = 0.0, torch.zeros(BUCKETS)
    for number, key in enumerate(sorted(update.tensors)):
        before, after = received.adapter.get(key), sent.adapter.get(key)
        if before is None or after is None or before.shape != after.shape:
            continue
        change = (after - before).flatten()
        squares += float(change.square().sum(dtype=torch.float64))
        rows = pad(change, (0, -len(change) % BUCKETS)).view(-1, BUCKETS)
        signs = torch.randint(0, 2, rows.shape, generator=torch.Generator().manual_seed(number)) * 2 - 1
        sketch += (rows * signs).sum(0)
    return Change(squares**0.5, sketch)
