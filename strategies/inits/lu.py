"""The triangular frames of LoLDU: the leading part of the frozen weight's LU decomposition.

Shi et al., *LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning*,
arXiv:2410.13618.

    P L D U = W, U with ones on its diagonal        B = P L[:, :r]        D[:r]        A = U[:r]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.adapter.values import LayerShape
from strategies.inits.init import Init, Start


@dataclass(frozen=True, kw_only=True)
class LU(Init):
    """Columns of L, rows of U, and the diagonal between them."""

    name = "lu"
    paper = "arXiv:2410.13618"
    sees = "weights"
    unit = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        b, a = torch.zeros(shape.d_out, rank), torch.zeros(rank, shape.d_in)
        if seen is None:
            return Start(b, a)
        p, lower, upper = torch.linalg.lu(seen.double())
        kept = min(rank, *shape)
        diagonal = upper.diagonal()[:kept]
        b[:, :kept] = (p @ lower)[:, :kept]
        # A weight of less than the whole rank has zeros on the diagonal, and rows of zeros beside them.
        a[:kept] = upper[:kept] / torch.where(diagonal == 0, 1.0, diagonal)[:, None]
        return Start(b, a, torch.diag(pad(diagonal.float(), (0, rank - kept))))
