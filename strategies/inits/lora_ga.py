"""LoRA-GA: the start whose first step is the best one that factors of rank r can make.

Wang, Yu, Li, *LoRA-GA: Low-Rank Adaptation with Gradient Approximation*, arXiv:2407.05000 (NeurIPS 2024).

    U S Vh = svd(G)        A = zeta Vh[:r]        B = zeta U[:, r:2r]        zeta = d_out^(1/4) / sqrt(stable)

With A and B orthonormal up to zeta, and of different directions of G, the first step B dA + dB A is the best rank-2r
approximation of -G. The paper takes s B A off the frozen weight; here the offset does, so that a 4-bit base stays as it
is. G is the gradient of the mean loss on the first ``examples`` of a public file, ``source``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.values import LayerShape
from common.method import option
from strategies.inits.init import PublicInit, Start


@dataclass(frozen=True, kw_only=True)
class LoraGA(PublicInit):
    """The leading directions of a public gradient: the first r for A, the next r for B."""

    stable: float = option(16.0, gt=0)
    """The paper's gamma: the factors are divided by its root."""

    name = "lora-ga"
    paper = "arXiv:2407.05000"
    sees = "gradients"

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        b, a = torch.zeros(shape.d_out, rank), torch.zeros(rank, shape.d_in)
        if seen is None:
            return Start(b, a)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, _, v = torch.svd_lowrank(seen, q=min(4 * rank, *shape), niter=4)
        zeta = shape.d_out**0.25 / self.stable**0.5
        left, right = u[:, rank : 2 * rank], v[:, :rank].T
        b[:, : left.shape[1]], a[: len(right)] = zeta * left, zeta * right
        return Start(b, a)
