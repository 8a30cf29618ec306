"""Well-formed updates examined before they are merged: how large each change is, whether it goes against the others."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from common.adapter.values import State, Update
from common.error import BouquetError
from strategies import Rule

BUCKETS = 4096
# The sketch errs by 1 / sqrt(BUCKETS) = 0.016, so that chance alone does not come this far; an update that is turned
# round lies beyond it where the others agree at all.
AGAINST = -0.1
# A larger share than this of the nodes is never named: who is wrong is a matter of numbers alone.
NAMED = 0.25
ITERATIONS = 50
FEWEST = 4
"""So many changes have to be there before one is compared with the others' median."""


class Change(NamedTuple):
    """The norm of what a node has changed, a sketch of its direction (``BUCKETS`` signed sums), and its weight."""

    norm: float
    sketch: Tensor
    weight: float


class Against(NamedTuple):
    """The nodes that go against the others, with the cosine; or how many there are in the smaller of two camps."""

    named: dict[str, float]
    camp: int


class Scrutiny:
    """The changes of one round. ``max_norm``, ``max_ratio`` and ``max_weight`` = 0 accept any.

    The sketch (a feature hash, arXiv:0902.2206) keeps cosines to about 1 / sqrt(BUCKETS) and needs no update to be
    kept, so that a rule may fold updates as they come.
    """

    def __init__(
        self, rule: Rule, state: State, max_norm: float, max_ratio: float = 0.0, max_weight: float = 0.0
    ) -> None:
        self._rule = rule
        self._state = state
        self._max_norm = max_norm
        self._max_ratio = max_ratio
        self._max_weight = max_weight
        self._canvas = Canvas(state)
        self._changes: dict[str, Change] = {}

    def examine(self, node: str, update: Update) -> float:
        """The norm of a node's change. Raises :class:`BouquetError` if it is above the bound."""
        change = measure(self._rule, self._state, update, self._canvas)
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
        """Nodes whose change or weight is too many times the median of the others', and why each is refused."""
        norms = {node: change.norm for node, change in self._changes.items()}
        weights = {node: change.weight for node, change in self._changes.items()}
        return {
            **_far_above(weights, self._max_weight, "weighs too much: expected a weight", "round.max-weight"),
            **_far_above(norms, self._max_ratio, "changes too much: expected a norm", "round.max-ratio"),
        }

    def largest(self) -> str:
        """The node that has changed most, of those that are left."""
        return max(self._changes, key=lambda node: self._changes[node].norm)

    def forget(self, node: str) -> None:
        """Leave a node's change out of account."""
        del self._changes[node]

    def against(self) -> Against:
        """Nodes whose change goes against that of most; or, where they are too many to say who is wrong, two camps.

        Every node counts alike, whatever the size of its change. The leading direction of all parts them in two camps;
        in the smaller one, those go against that have a negative cosine with the sum of the larger one. More than a
        quarter are not named: as many nodes could be the honest ones among more that collude.
        """
        nodes = sorted(node for node, change in self._changes.items() if change.norm > 0)
        if len(nodes) < 3:
            return Against({}, 0)
        units = torch.stack([self._changes[node].sketch for node in nodes])
        units.div_(torch.linalg.vector_norm(units, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny))
        ahead = units @ _leading(units) >= 0
        if 2 * int(ahead.sum()) < len(nodes):
            ahead = ~ahead
        cosines = torch.nn.functional.cosine_similarity(units, units[ahead].sum(0), dim=1)
        found = {nodes[place]: float(cosines[place]) for place in (cosines < AGAINST).nonzero().flatten().tolist()}
        camp = max(len(found), len(nodes) - int(ahead.sum())) if found else 0
        return Against({}, camp) if camp > NAMED * len(nodes) else Against(found, 0)


def _far_above(figures: Mapping[str, float], times: float, what: str, setting: str) -> dict[str, str]:
    """The nodes whose figure is more than so many ``times`` the median of the others', and what is said of each."""
    if not times or len(figures) < FEWEST:
        return {}
    ordered, refused = sorted(figures.values()), {}
    for node, figure in figures.items():
        usual = median_without(ordered, figure)
        if figure > times * usual > 0:
            bound = f"at most {times:g} times the others' median, {usual:.4g} ({setting})"
            refused[node] = f"an update that {what} of {bound}, got {figure:.4g}"
    return refused


def median_without(ordered: Sequence[float], value: float) -> float:
    """The median of ``ordered``, which holds ``value``, without it once."""
    own, rest = bisect_left(ordered, value), len(ordered) - 1
    low, high = (ordered[place + (place >= own)] for place in ((rest - 1) // 2, rest // 2))
    return (low + high) / 2


def _leading(units: Tensor) -> Tensor:
    """The direction that most of these unit vectors (``n x BUCKETS``) lie along, either way; by power iteration."""
    direction = units.sum(0)
    for _ in range(ITERATIONS):
        direction = torch.nn.functional.normalize(units.T @ (units @ direction), dim=0)
    return direction


class Canvas:
    """Memory for one change, laid out as the state is: ``whole`` is flat, and ends in zeros up to whole buckets."""

    def __init__(self, state: State) -> None:
        sizes = [tensor.numel() for tensor in state.adapter.values()]
        self.whole = torch.zeros(sum(sizes) + -sum(sizes) % BUCKETS)
        chunks = torch.split(self.whole[: sum(sizes)], sizes)
        self.places = {
            key: chunk.view(tensor.shape) for (key, tensor), chunk in zip(state.adapter.items(), chunks, strict=True)
        }


def measure(rule: Rule, state: State, update: Update, canvas: Canvas) -> Change:
    """The change from what the node had received to what it had when it sent."""
    received = state if update.slots else rule.view(state, update.rank or state.rank)
    sent = rule.model(state, update)
    if update.rank != state.rank or len(update.tensors) < len(canvas.places):
        canvas.whole.zero_()
    for key in update.tensors:
        before, after = received.adapter.get(key), sent.adapter.get(key)
        if before is not None and after is not None and before.shape == after.shape:
            # The change of a node of a smaller rank has its place in the state's: those of all nodes lie alike.
            place = canvas.places[key]
            if place.shape != before.shape:
                place = place[tuple(map(slice, before.shape))]
            torch.sub(after, before, out=place)
    rows = canvas.whole.view(-1, BUCKETS)
    # Row by row in float32, which loses nothing that shows and takes a fifth of a sum in float64.
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1).double())
    sketch = rows.mul_(_signs(len(canvas.whole)).view(-1, BUCKETS)).sum(0)
    return Change(float(norm), sketch, update.weight)


@lru_cache(maxsize=1)
def _signs(count: int) -> Tensor:
    """The sketch's signs, -1 or 1, the same for all nodes; drawn once, as they are half of its cost."""
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).float()
