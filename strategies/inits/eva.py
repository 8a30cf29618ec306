"""EVA: A looks where the layer's inputs vary most.

Paischer et al., *Parameter Efficient Fine-tuning via Explained Variance Adaptation*, arXiv:2410.07170 (NeurIPS 2025).

    U S Vh = svd(X)        A = Vh[:r]        B = 0        X the inputs of the layer, n x d_in

X are the inputs on the first ``examples`` of a public file, ``source``. The paper also gives layers with more variance
more of the rank; here every layer has the same, as the rules want. What is frozen for good under FFA-LoRA is a subspace
that the data have chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.draws import kaiming
from common.adapter.values import LayerShape
from strategies.inits.init import PublicInit, Start


@dataclass(frozen=True, kw_only=True)
class Eva(PublicInit):
    """The leading directions of a layer's inputs, and B of zeros."""

    name = "eva"
    paper = "arXiv:2410.07170"
    sees = "inputs"
    zero = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        # Inputs of fewer directions than the rank leave slots that are drawn, since with A zero too none would learn.
        b, a = torch.zeros(shape.d_out, rank), kaiming(rank, shape.d_in, generator)
        if seen is None:
            return Start(b, a)
        _, singular, vh = torch.linalg.svd(seen.double(), full_matrices=False)
        kept = min(rank, int((singular > 1e-6 * singular.max()).sum()))
        a[:kept] = vh[:kept]
        return Start(b, a)
