"""OLoRA: the factors are the first part of the frozen weight's QR decomposition.

Buyukakyuz, *OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models*, arXiv:2406.01775.

    Q R = qr(W)        B = Q[:, :r]        A = R[:r]

Here the offset takes B A off again, and the frozen weight stays as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.inits.init import Start, WeightInit


@dataclass(frozen=True, kw_only=True)
class OLora(WeightInit):
    """An orthonormal basis of the weight's first columns, and what it makes of the weight."""

    name = "olora"
    paper = "arXiv:2406.01775"

    def split(self, weight: Tensor, kept: int) -> Start:
        q, r = torch.linalg.qr(weight)
        return Start(q[:, :kept], r[:kept])
