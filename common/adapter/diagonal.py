"""A trained diagonal as a module, for structures that have one."""

from typing import Any

import torch
from torch import Tensor, nn


class Diagonal(nn.Module):
    """``y = d * x`` on the last axis, ``d`` of ``size`` values."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``... x size`` to the same."""
        return x * self.weight


class Followed(nn.Module):
    """A linear layer of PEFT's with a diagonal behind it; PEFT reads its ``weight``'s type."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear: Any = linear
        self.diagonal = Diagonal(linear.out_features, linear.weight.device)

    @property
    def weight(self) -> Tensor:
        """The linear layer's."""
        weight: Tensor = self.linear.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``diag(d) W x``."""
        y: Tensor = self.diagonal(self.linear(x))
        return y
