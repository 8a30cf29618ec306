"""The aggregation error of a round: how far the merged model is from the weighted mean of the nodes' models.

For each layer, with ``D* = sum_k p_k (s_k B_k A_k + Q P)`` the ideal update and ``D`` the merged one,

    error = |D - D*| / |D*|        (Frobenius norms)

from factors only: the norm of a product ``L R`` is ``sum((L^T L) * (R R^T))``, whatever its rank. Of more than a few
updates, which would have to be held together, the norms are estimated: ``|M|^2`` is the mean of ``|M w|^2`` over normal
vectors w.
"""

import math
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from common.adapter.algebra import squared_norm
from common.adapter.values import Key, State, Update
from strategies.rules.rule import Rule

HELD_TOGETHER = 16
PROBES = 16

Terms = list[tuple[Tensor, Tensor]]
Squares = dict[str, tuple[float, float]]
"""By layer, the squared norm of the error and of the ideal update."""


class Meter:
    """The error of one round, from the updates on their way to the merge: a thousand of them are read once.

    ``state`` is what the nodes started from, ``count`` how many updates there are.
    """

    def __init__(self, rule: Rule, state: State, count: int) -> None:
        self._rule = rule
        self._state = state
        self._count = count
        self._held: list[Update] = []
        self._estimate = Estimate(rule, state)

    def watch(self, updates: Iterable[Update]) -> Iterator[Update]:
        """The ``updates`` themselves, noted as they pass; a merge that is tried again begins anew."""
        self._held, self._estimate = [], Estimate(self._rule, self._state)
        for update in updates:
            if self._count <= HELD_TOGETHER:
                self._held.append(update)
            else:
                self._estimate.add(update)
            yield update

    def read(self, merged: State) -> dict[str, float]:
        """The error of every layer, and of all together under ``""``; 0 where the ideal update is zero."""
        squares = _exact(self._rule, self._state, self._held, merged) if self._held else self._estimate.squares(merged)
        squares[""] = (sum(error for error, _ in squares.values()), sum(ideal for _, ideal in squares.values()))
        return {layer: math.sqrt(error / ideal) if ideal else 0.0 for layer, (error, ideal) in squares.items()}


def aggregation_error(rule: Rule, state: State, updates: Collection[Update], merged: State) -> dict[str, float]:
    """:meth:`Meter.read` of ``updates`` that are at hand, and of what the rule made of them."""
    meter = Meter(rule, state, len(updates))
    for _ in meter.watch(updates):
        pass
    return meter.read(merged)


class Estimate:
    """The images of some probes under the ideal update, summed over the nodes.

    In float32 and in place: in float64 the sum would be most of the work, for digits that an estimate does not have.
    """

    def __init__(self, rule: Rule, state: State) -> None:
        self._rule = rule
        self._state = state
        self._total = 0.0
        generator = torch.Generator().manual_seed(state.round)
        widths = {layer: state.adapter[Key(layer, "A")].shape[1] for layer in state.layers()}
        self._probes = {layer: torch.randn(width, PROBES, generator=generator) for layer, width in widths.items()}
        self._sums = {layer: torch.zeros(len(state.adapter[Key(layer, "B")]), PROBES) for layer in widths}

    def add(self, update: Update) -> None:
        """Take one node's model into the sum."""
        model = self._rule.model(self._state, update)
        self._total += update.weight
        for layer, probe in self._probes.items():
            left, right = self._rule.structure.factors(model.adapter, layer)
            self._sums[layer].addmm_(left, right @ probe, alpha=update.weight * model.scale)

    def squares(self, merged: State) -> Squares:
        """The squared norms of what the merged model lost, and of the ideal update."""
        found: Squares = {}
        for layer, probe in self._probes.items():
            ideal = self._sums[layer].double() / self._total + _image(_offset(self._state, layer), probe)
            reached = _image(_product(self._rule, merged, layer) + _offset(merged, layer), probe)
            found[layer] = ((reached - ideal).square().sum().item(), ideal.square().sum().item())
        return found


def _exact(rule: Rule, state: State, updates: list[Update], merged: State) -> Squares:
    total = sum(update.weight for update in updates)
    models = [rule.model(state, update) for update in updates]
    squares: Squares = {}
    for layer in state.layers():
        ideal = _offset(state, layer)
        for update, model in zip(updates, models, strict=True):
            ideal += [(left, update.weight / total * right) for left, right in _product(rule, model, layer)]
        reached = _product(rule, merged, layer) + _offset(merged, layer)
        error = ideal + [(-left, right) for left, right in reached]
        squares[layer] = (_square(error), _square(ideal))
    return squares


def _product(rule: Rule, state: State, layer: str) -> Terms:
    left, right = rule.structure.factors(state.adapter, layer)
    return [(left, state.scale * right)]


def _offset(state: State, layer: str) -> Terms:
    q = Key(layer, "Q")
    return [(state.offset[q], state.offset[Key(layer, "P")])] if q in state.offset else []


def _square(terms: Terms) -> float:
    """The squared norm of a sum of products."""
    left, right = (torch.cat(parts, dim=dim) for parts, dim in zip(zip(*terms, strict=True), (1, 0), strict=True))
    return squared_norm(left, right).item()


def _image(terms: Terms, probe: Tensor) -> Tensor:
    """What a sum of products makes of ``probe`` (``d_in x n``)."""
    zero = torch.zeros((), dtype=torch.float64)
    return sum((left.double() @ (right @ probe).double() for left, right in terms), zero)
