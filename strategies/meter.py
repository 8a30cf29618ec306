"""The aggregation error of a round: how far the merged model is from the weighted mean of the nodes' models.

For each layer, with ``D* = sum_k p_k (s_k B_k A_k + Q P)`` the ideal update and ``D`` the merged one,

    error = |D - D*| / |D*|        (Frobenius norms)

from factors only: the norm of a product ``L R`` is ``sum((L^T L) * (R R^T))``, whatever its rank. Of more than a few
updates, which would have to be held together, the norms are estimated: ``|M|^2`` is the mean of ``|M w|^2`` over normal
vectors w.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from common.adapter import Key, State, Update, cored, squared_norm
from strategies.rule import Rule

HELD_TOGETHER = 16
PROBES = 32

Terms = list[tuple[Tensor, Tensor]]
Squares = dict[str, tuple[float, float]]
"""By layer, the squared norm of the error and of the ideal update."""


class Replies(Protocol):
    """Updates that can be counted before they are read."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Update]: ...


def aggregation_error(rule: Rule, state: State, updates: Replies, merged: State) -> dict[str, float]:
    """The error of every layer, and of all layers together under ``""``; 0 where the ideal update is zero.

    ``state`` is what the nodes started from, ``updates`` what they sent, ``merged`` what the rule made of it.
    """
    if len(updates) <= HELD_TOGETHER:
        squares = _exact(rule, state, list(updates), merged)
    else:
        squares = _estimated(rule, state, updates, merged)
    squares[""] = (sum(error for error, _ in squares.values()), sum(ideal for _, ideal in squares.values()))
    return {layer: math.sqrt(error / ideal) if ideal else 0.0 for layer, (error, ideal) in squares.items()}


def _exact(rule: Rule, state: State, updates: list[Update], merged: State) -> Squares:
    total = sum(update.weight for update in updates)
    models = [rule.model(state, update) for update in updates]
    squares: Squares = {}
    for layer in state.layers():
        ideal = _offset(state, layer)
        for update, model in zip(updates, models, strict=True):
            ideal += [(left, update.weight / total * right) for left, right in _product(model, layer)]
        reached = _product(merged, layer) + _offset(merged, layer)
        error = ideal + [(-left, right) for left, right in reached]
        squares[layer] = (_square(error), _square(ideal))
    return squares


def _estimated(rule: Rule, state: State, updates: Iterable[Update], merged: State) -> Squares:
    generator = torch.Generator().manual_seed(state.round)
    layers = state.layers()
    probes = {
        layer: torch.randn(state.adapter[Key(layer, "A")].shape[1], PROBES, generator=generator) for layer in layers
    }
    total, summed = 0.0, dict[str, Tensor]()
    for update in updates:
        model = rule.model(state, update)
        total += update.weight
        for layer, probe in probes.items():
            image = update.weight * _image(_product(model, layer), probe)
            summed[layer] = summed[layer] + image if layer in summed else image
    squares: Squares = {}
    for layer, probe in probes.items():
        ideal = summed[layer] / total + _image(_offset(state, layer), probe)
        reached = _image(_product(merged, layer) + _offset(merged, layer), probe)
        squares[layer] = ((reached - ideal).square().sum().item(), ideal.square().sum().item())
    return squares


def _product(state: State, layer: str) -> Terms:
    return [(state.adapter[Key(layer, "B")], state.scale * cored(state.adapter, layer))]


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
