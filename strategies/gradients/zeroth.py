"""Zeroth order: a slope from two forward passes, and no backward.

Malladi et al., *Fine-Tuning Language Models with Just Forward Passes*, arXiv:2305.17333 (NeurIPS 2023): MeZO.

    g = (L(c + epsilon) - L(c - epsilon)) / (2 epsilon)        c  the scalar that is trained in this step

Along a direction z from w, L(c) is L(w + c z), and g is MeZO's projected gradient: which direction it is, is the
structure's (``seeded``). Nothing is kept for a backward pass, so that a step needs the memory of inference. The network
is in evaluation mode: with dropout the two losses would be of two networks. The published code of FedKSeed skips a step
whose losses lie further apart than its "clip"; here a slope is clipped as any gradient is (``train.clip-norm``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.adapter.structure import Structure
from common.method import option
from strategies.gradients.gradient import Gradient


@dataclass(frozen=True, kw_only=True)
class Zeroth(Gradient):
    """The central difference by the one scalar that does not rest."""

    epsilon: float = option(1e-3, gt=0, le=1)
    """How far to either side the loss is looked at, in every value of the adapter."""

    name = "zeroth"
    paper = "arXiv:2305.17333"
    training = False
    heads = False

    @classmethod
    def knows(cls, structure: Structure) -> bool:
        """One that trains a scalar a step."""
        return structure.gradient == cls.name

    @torch.no_grad()
    def fill(self, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        (scalar,) = (parameter for parameter in parameters if parameter.requires_grad)
        start = scalar.clone()

        def at(step: float) -> Tensor:
            scalar.copy_(start + step)
            return loss()

        above, below = at(self.epsilon), at(-self.epsilon)
        scalar.copy_(start)
        slope = ((above - below) / (2 * self.epsilon)).to(scalar)
        scalar.grad = slope.view_as(scalar) if scalar.grad is None else scalar.grad + slope
        return (above + below) / 2
