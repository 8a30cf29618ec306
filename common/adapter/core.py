"""The trained core of an adapter, between its two frozen frames.

PEFT computes ``s B(A(x))``. Here A is followed by a core of h square blocks, ``s B(R(A(x)))``: R is block-diagonal,
its blocks of ``q x q`` with ``h q = r``, each multiplied by a scalar of its own. The blocks are linear layers, so that
whoever needs gradients of single examples finds a layer that they know, and each can be frozen by itself.
"""

import torch
from torch import Tensor, nn


class CoredDown(nn.Module):
    """PEFT's ``lora_A``, followed by a core of ``blocks`` blocks."""

    def __init__(self, down: nn.Linear, blocks: int) -> None:
        super().__init__()
        size = down.out_features // blocks
        device = down.weight.device
        self.down = down
        self.blocks = nn.ModuleList(nn.Linear(size, size, bias=False, device=device) for _ in range(blocks))
        self.scales = nn.ParameterList(torch.ones(1, device=device) for _ in range(blocks))

    @property
    def weight(self) -> Tensor:
        """A; PEFT reads its type."""
        return self.down.weight

    @property
    def in_features(self) -> int:
        """The layer's inputs."""
        return self.down.in_features

    def forward(self, x: Tensor) -> Tensor:
        """``R(A(x))``, ``N x T x d_in`` to ``N x T x r``."""
        parts = self.down(x).chunk(len(self.blocks), dim=-1)
        return torch.cat(
            [scale * block(part) for scale, block, part in zip(self.scales, self.blocks, parts, strict=True)], dim=-1
        )
