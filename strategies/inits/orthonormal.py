"""Two random orthonormal frames, for what is trained between them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.draws import orthonormal_rows
from common.adapter.values import LayerShape
from strategies.inits.init import Init, Start


@dataclass(frozen=True, kw_only=True)
class Orthonormal(Init):
    """Rows of A and columns of B, orthonormal to each other."""

    name = "orthonormal"
    paper = "arXiv:2506.05568"
    orthonormal = True
    unit = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        a = orthonormal_rows(rank, shape.d_in, generator)
        return Start(orthonormal_rows(rank, shape.d_out, generator).T.contiguous(), a)
