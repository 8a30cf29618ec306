"""LoRA-SB's start: the best low-rank factors of the first step of full fine-tuning.

Ponkshe et al., *Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning*, arXiv:2411.19557.

    U S Vh = svd(-step sign G)        B = U,  R = S,  A = Vh        G the gradient by the frozen weight

The published federated code takes G from the nodes' pooled private data, un-noised. Here it comes from a public file
that the coordinator names in ``source``. The start is that step away from the base model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.values import LayerShape
from common.method import option
from strategies.inits.init import PublicInit, Start


@dataclass(frozen=True, kw_only=True)
class LoraSB(PublicInit):
    """The first ``examples`` of ``source``, and a ``step`` against the sign of their gradient."""

    examples: int = option(50, ge=1)
    """How many examples from its beginning are looked at."""
    step: float = option(1e-4, gt=0)
    """The length of the step against the gradient's sign that the start is."""

    name = "lora-sb"
    paper = "arXiv:2411.19557"
    sees = "gradients"
    orthonormal = True
    unit = True
    moves = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        b, a, core = torch.zeros(shape.d_out, rank), torch.zeros(rank, shape.d_in), torch.zeros(rank, rank)
        if seen is None:
            return Start(b, a, core)
        kept = min(rank, *shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, singular, v = torch.svd_lowrank(-self.step * seen.sign(), q=kept, niter=10)
        b[:, :kept], a[:kept], core[:kept, :kept] = u, v.T, torch.diag(singular)
        return Start(b, a, core)
