"""OLoRA: the factors are the first part of the frozen weight's QR decomposition.

Buyukakyuz, *OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models*, arXiv:2406.01775.

    Q R = qr(W)        B = Q[:, :r]        A = R[:r]

Here the offset takes B A off again, and the frozen weight stays as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.values import LayerShape
from strategies.inits.init import Init, Start


@dataclass(frozen=True, kw_only=True)
class OLora(Init):
    """An orthonormal basis of the weight's first columns, and what it makes of the weight."""

    name = "olora"
    paper = "arXiv:2406.01775"
    sees = "weights"
    unit = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        b, a = torch.zeros(shape.d_out, rank), torch.zeros(rank, shape.d_in)
        if seen is None:
            return Start(b, a)
        q, r = torch.linalg.qr(seen.double())
        kept = min(rank, *shape)
        b[:, :kept], a[:kept] = q[:, :kept], r[:kept]
        return Start(b, a)
