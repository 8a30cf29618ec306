"""Means by order statistics, coordinate by coordinate.

Yin et al., *Byzantine-Robust Distributed Learning*, arXiv:1803.01498: the median of definition 1 and the trimmed mean
of definition 2. Every node has one vote, because a weight is what a hostile node would lie about, and all updates are
looked at together, so nothing can be folded as it comes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.algebra import mean_of
from common.adapter.values import State, Tensors
from common.method import option
from strategies.means.mean import Mean, Memory, Updates


@dataclass(frozen=True, kw_only=True)
class Trimmed(Mean):
    """The mean without the ``share`` largest and the ``share`` smallest values."""

    share: float = option(0.1, ge=0, lt=0.5)
    """The share of the nodes whose values are cut at each end."""

    name = "trimmed"
    paper = "arXiv:1803.01498"

    def __call__(self, state: State, updates: Updates) -> tuple[Tensors, Memory]:
        return trimmed([tensors for _, tensors in updates], self.share), {}


@dataclass(frozen=True, kw_only=True)
class Median(Mean):
    """The middle value, or the mean of the two in the middle."""

    name = "median"
    paper = "arXiv:1803.01498"

    def __call__(self, state: State, updates: Updates) -> tuple[Tensors, Memory]:
        return trimmed([tensors for _, tensors in updates], 0.5), {}


def trimmed(replies: list[Tensors], share: float) -> Tensors:
    """The mean of what is left when ``share`` of the values is cut at each end; of one or two at least."""
    cut = min(int(share * len(replies)), (len(replies) - 1) // 2)

    def middle(values: list[Tensor]) -> Tensor:
        return mean_of(list(torch.stack(values).sort(dim=0).values[cut : len(values) - cut]))

    return {key: middle([tensors[key] for tensors in replies]) for key in replies[0]}
