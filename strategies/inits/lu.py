"""The triangular frames of LoLDU: the leading part of the frozen weight's LU decomposition.

Shi et al., *LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning*,
arXiv:2410.13618.

    P L D U = W, U with ones on its diagonal        B = P L[:, :r]        D[:r]        A = U[:r]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.inits.init import Start, WeightInit


@dataclass(frozen=True, kw_only=True)
class LU(WeightInit):
    """Columns of L, rows of U, and the diagonal between them."""

    name = "lu"
    paper = "arXiv:2410.13618"

    def split(self, weight: Tensor, kept: int) -> Start:
        p, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()[:kept]
        # A weight of less than the whole rank has zeros on the diagonal, and rows of zeros beside them.
        rows = upper[:kept] / torch.where(diagonal == 0, 1.0, diagonal)[:, None]
        return Start((p @ lower)[:, :kept], rows, torch.diag(diagonal))
