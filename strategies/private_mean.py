"""The mean of the nodes' changes with differential privacy: update-level privacy with a trusted coordinator.

McMahan et al., *Learning Differentially Private Recurrent Language Models*, arXiv:1710.06963. Two rounds are neighbours
if one node more takes part in one of them. With W what the nodes were sent and n how many were asked,

    W + (sum_k clip(W_k - W, C) + N(0, (sigma C)^2)) / n

where a change is one vector over all its tensors. The coordinator clips, so no node has to be believed; every node
counts the same, whatever weight it names; and n is the number asked, because who replied is not public.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from common.adapter.values import State, Tensors, Update
from common.privacy.gaussian import Gaussian, clip


@dataclass(frozen=True)
class PrivateMean:
    """Stands in for the updates of a linear rule, which needs nothing but their mean."""

    clip: float
    noise_multiplier: float
    relative: bool = False
    """The updates are changes already, and so is their mean."""

    def __call__(self, state: State, updates: Iterable[Update], asked: int) -> Update:
        """One update that is the private mean; ``updates`` are checked, and held one at a time."""
        mechanism = Gaussian(self.clip, self.noise_multiplier)
        start = {key: torch.zeros_like(t) if self.relative else t for key, t in state.adapter.items()}
        total: Tensors = {}
        for update in updates:
            change = {key: tensor.double() - start[key] for key, tensor in update.tensors.items()}
            for key, clipped in clip(change, mechanism.bound).items():
                total[key] = total[key] + clipped if key in total else clipped
        mean = {key: (start[key] + noised / asked).to(start[key].dtype) for key, noised in mechanism.release(total)}
        return Update(mean, 1.0, state.scale)
