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

from common.adapter.values import LayerShape
from strategies.inits.init import Init, Start


@dataclass(frozen=True, kw_only=True)
class Pissa(Init):
    """The leading singular directions of the weight."""

    name = "pissa"
    paper = "arXiv:2404.02948"
    sees = "weights"
    unit = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        b, a = torch.zeros(shape.d_out, rank), torch.zeros(rank, shape.d_in)
        if seen is None:
            return Start(b, a)
        u, singular, vh = torch.linalg.svd(seen.double(), full_matrices=False)
        kept, root = min(rank, *shape), singular.sqrt()
        b[:, :kept], a[:kept] = (u * root)[:, :kept], (root[:, None] * vh)[:kept]
        return Start(b, a)
