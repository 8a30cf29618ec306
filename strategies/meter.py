"""The aggregation error of a round: how far the merged model is from the weighted mean of the nodes' models.

For each layer, with ``D* = sum_k p_k (s_k B_k A_k + Q P)`` the ideal update and ``D`` the merged one,

    error = |D - D*| / |D*|        (Frobenius norms)

from factors only: the norm of a product ``L R`` is ``sum((L^T L) * (R R^T))``, whatever its rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.adapter import Key, State, Update


def aggregation_error(state: State, updates: Sequence[Update], merged: State) -> dict[str, float]:
    """The error of every layer, and of all layers together under ``""``; 0 where the ideal update is zero.

    ``state`` is what the nodes started from, ``updates`` what they sent, ``merged`` what the rule made of it.
    """
    total = sum(update.weight for update in updates)
    errors: dict[str, float] = {}
    squares = torch.zeros(2, dtype=torch.float64)
    for layer in state.layers():
        ideal: list[tuple[Tensor, Tensor]] = []
        for update in updates:
            b = update.tensors.get(Key(layer, "B"), state.adapter[Key(layer, "B")])
            a = update.tensors.get(Key(layer, "A"), state.adapter[Key(layer, "A")])
            ideal.append((b, update.weight / total * update.scale * a))
        ideal += _offset(state, layer)
        reached = [(merged.adapter[Key(layer, "B")], merged.scale * merged.adapter[Key(layer, "A")])]
        reached += _offset(merged, layer)
        pair = torch.stack([_square(ideal + [(-left, right) for left, right in reached]), _square(ideal)])
        errors[layer] = _ratio(pair)
        squares += pair
    return errors | {"": _ratio(squares)}


def _offset(state: State, layer: str) -> list[tuple[Tensor, Tensor]]:
    q = Key(layer, "Q")
    return [(state.offset[q], state.offset[Key(layer, "P")])] if q in state.offset else []


def _square(terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The squared norm of a sum of products."""
    left = torch.cat([left for left, _ in terms], dim=1).double()
    right = torch.cat([right for _, right in terms], dim=0).double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0)


def _ratio(pair: Tensor) -> float:
    error, ideal = pair.tolist()
    return math.sqrt(error / ideal) if ideal else 0.0
