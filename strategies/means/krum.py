"""Multi-Krum: the mean of the updates nearest to their neighbours.

Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, arXiv:1703.02757. The score
of an update is the sum of its squared distances to the K - hostile - 2 nearest others; all but the ``hostile`` updates
with the largest scores are averaged. Its guarantee wants K >= 2 hostile + 3. Every node has one vote.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.algebra import weighted_mean
from common.adapter.values import State, Tensors
from common.method import option
from strategies.means.mean import Mean, Memory, Updates


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Mean):
    """The mean of all updates but the ``hostile`` ones that lie farthest off."""

    hostile: int = option(1, ge=1)
    """How many nodes may be hostile; as many updates are left out."""

    name = "krum"
    paper = "arXiv:1703.02757"

    def __call__(self, state: State, updates: Updates) -> tuple[Tensors, Memory]:
        replies = [tensors for _, tensors in updates]
        square = sum(_squared_distances([tensors[key] for tensors in replies]) for key in replies[0])
        nearest = max(1, len(replies) - self.hostile - 2)
        scores = torch.as_tensor(square).sort(dim=1).values[:, 1 : nearest + 1].sum(dim=1)
        kept = scores.argsort(stable=True)[: max(1, len(replies) - self.hostile)].sort().values
        return weighted_mean((1.0, replies[index]) for index in kept.tolist()), {}


def _squared_distances(values: list[Tensor]) -> Tensor:
    """The squared distances between all pairs, ``K x K``."""
    flat = torch.stack([value.reshape(-1) for value in values]).double()
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
