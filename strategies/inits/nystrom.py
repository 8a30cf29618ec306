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

from common.adapter.values import LayerShape
from strategies.inits.init import Init, Start


@dataclass(frozen=True, kw_only=True)
class Nystrom(Init):
    """Bases of the weight's first columns and rows."""

    name = "nystrom"
    paper = "arXiv:2502.14482"
    sees = "weights"
    orthonormal = True
    unit = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        b, a = torch.zeros(shape.d_out, rank), torch.zeros(rank, shape.d_in)
        if seen is None:
            return Start(b, a)
        weight, kept, core = seen.double(), min(rank, *shape), torch.zeros(rank, rank)
        left, right = torch.linalg.qr(weight[:, :kept])[0], torch.linalg.qr(weight[:kept].T)[0]
        b[:, :kept], a[:kept] = left, right.T
        core[:kept, :kept] = left.T @ weight @ right
        return Start(b, a, core)
