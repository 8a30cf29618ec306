"""Stochastic gradient descent: Robbins and Monro, *A Stochastic Approximation Method*, 1951; torch's.

    w <- w - rate g

It has no moments, and so no state: what moves is what has a gradient in this step. Its rate is of another kind than
AdamW's, whose steps are as long whatever the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.adapter.structure import Pair
from strategies.optimizers.optimizer import Group, Optimizer


@dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """A step along the gradient, as long as that is."""

    name = "sgd"
    paper = "none"

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": list(part.parameters), "lr": part.rate} for part in (adapter, head)]
        return torch.optim.SGD(groups)
