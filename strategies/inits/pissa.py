"""PiSSA: the factors are the main part of the frozen weight.

Meng, Wang, Zhang, *PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models*,
arXiv:2404.02948 (NeurIPS 2024).

    U S Vh = svd(W)        B = U[:, :r] S[:r]^(1/2)        A = S[:r]^(1/2) Vh[:r]

The paper takes B A off the frozen weight and quantises what is left of it. Here the offset takes it off, so that a
4-bit base stays as it is, and every node has the same one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.inits.init import Start, WeightInit


@dataclass(frozen=True, kw_only=True)
class Pissa(WeightInit):
    """The leading singular directions of the weight."""

    name = "pissa"
    paper = "arXiv:2404.02948"

    def split(self, weight: Tensor, kept: int) -> Start:
        u, singular, vh = torch.linalg.svd(weight, full_matrices=False)
        root = singular[:kept].sqrt()
        return Start(u[:, :kept] * root, root[:, None] * vh[:kept])
