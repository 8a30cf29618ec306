"""The frames of NLoRA and IntTune: the first columns and the first rows of the frozen weight.

Guo et al., *NLoRA: Nystrom-Initiated Low-Rank Adaptation for Large Language Models*, arXiv:2502.14482.

    B = qr(W[:, :r]).Q        A = qr(W[:r, :]^T).Q^T        between them B^T W A^T

The paper has W[:, :r] pinv(W[:r, :r]) W[:r, :]. The bases span the same; between them stands what fits W best, where
the paper's inverse of a block may be of any size. (The published code leaves the inverse out, and takes nothing off.)
Neither data nor a decomposition of the whole weight is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.inits.init import Start, WeightInit


@dataclass(frozen=True, kw_only=True)
class Nystrom(WeightInit):
    """Bases of the weight's first columns and rows."""

    name = "nystrom"
    paper = "arXiv:2502.14482"
    orthonormal = True

    def split(self, weight: Tensor, kept: int) -> Start:
        left, right = torch.linalg.qr(weight[:, :kept])[0], torch.linalg.qr(weight[:kept].T)[0]
        return Start(left, right.T, left.T @ weight @ right)
