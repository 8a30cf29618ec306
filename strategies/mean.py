"""How a mean over the nodes is taken: the weighted one, and three that a few hostile nodes cannot move far.

The robust ones give every node one vote, because a weight is what a hostile node would lie about, and look at all
updates together, so nothing can be folded as it comes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.algebra import weighted_mean
from common.adapter.values import Tensors

Updates = Iterable[tuple[float, Tensors]]


@dataclass(frozen=True)
class Mean(ABC):
    """A function from the nodes' weights and tensors to one set of tensors."""

    @abstractmethod
    def __call__(self, updates: Updates) -> Tensors:
        """The mean; ``updates`` holds at least one."""


@dataclass(frozen=True)
class WeightedMean(Mean):
    """``sum_k p_k x_k``, folded one update at a time."""

    def __call__(self, updates: Updates) -> Tensors:
        return weighted_mean(updates)


@dataclass(frozen=True)
class TrimmedMean(Mean):
    """Coordinate by coordinate, without the ``share`` largest and the ``share`` smallest values.

    Yin et al., *Byzantine-Robust Distributed Learning*, arXiv:1803.01498, definition 2; ``share`` = 0.5 leaves the
    median of definition 1.
    """

    share: float = 0.1

    def __call__(self, updates: Updates) -> Tensors:
        replies = [tensors for _, tensors in updates]
        cut = min(int(self.share * len(replies)), (len(replies) - 1) // 2)

        def trimmed(values: list[Tensor]) -> Tensor:
            middle = torch.stack(values).sort(dim=0).values[cut : len(values) - cut]
            return weighted_mean((1.0, {"": value}) for value in middle)[""]  # type: ignore[index, dict-item]

        return {key: trimmed([tensors[key] for tensors in replies]) for key in replies[0]}


@dataclass(frozen=True)
class MultiKrum(Mean):
    """The mean of the updates that lie nearest to their neighbours, all but ``hostile`` of them.

    Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, arXiv:1703.02757: the
    score of an update is the sum of its squared distances to the K - hostile - 2 nearest others. Its guarantee wants
    K >= 2 hostile + 3.
    """

    hostile: int = 1

    def __call__(self, updates: Updates) -> Tensors:
        replies = [tensors for _, tensors in updates]
        square = sum(_squared_distances([tensors[key] for tensors in replies]) for key in replies[0])
        nearest = max(1, len(replies) - self.hostile - 2)
        scores = torch.as_tensor(square).sort(dim=1).values[:, 1 : nearest + 1].sum(dim=1)
        kept = scores.argsort(stable=True)[: max(1, len(replies) - self.hostile)].sort().values
        return weighted_mean((1.0, replies[index]) for index in kept.tolist())


def _squared_distances(values: list[Tensor]) -> Tensor:
    """The squared distances between all pairs, ``K x K``."""
    flat = torch.stack([value.reshape(-1) for value in values]).double()
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
