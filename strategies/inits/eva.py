"""EVA: A looks where the layer's inputs vary most.

Paischer et al., *Parameter Efficient Fine-tuning via Explained Variance Adaptation*, arXiv:2410.07170 (NeurIPS 2025).

    U S Vh = svd(X)        A = Vh[:r]        B = 0        X the inputs of the layer, n x d_in

X are the inputs on the first ``examples`` of a public file, ``source``. What is frozen for good under FFA-LoRA is a
subspace that the data have chosen.

With ``rho`` above 1 the slots go where they explain the most of their layer's variance, s_i^2 / sum_j s_j^2: L layers
have L r / rho in all, and each of them one at least. In the paper a layer may have rho times its share, and here
``lora.rank`` is the most that one has, so that a run's limits hold; there a layer may have none. The sum is over the
directions that are kept of X, the ``SPARE`` r leading ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.draws import kaiming
from common.adapter.values import LayerShape
from common.method import option
from strategies.inits.init import PublicInit, Start


@dataclass(frozen=True, kw_only=True)
class Eva(PublicInit):
    """The leading directions of a layer's inputs, and B of zeros."""

    rho: float = option(1.0, ge=1, le=1000)
    """How many times the mean rank of the layers `lora.rank` is; 1 gives all of them that."""

    name = "eva"
    paper = "arXiv:2410.07170"
    sees = "inputs"
    zero = True

    @property
    def shares_out(self) -> bool:
        return self.rho > 1

    def ranks(self, singular: Mapping[str, Tensor], rank: int) -> Mapping[str, int]:
        further = []
        for layer, values in singular.items():
            squares = values.square()
            explained = squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
            further += [(share, -place, layer) for place, share in enumerate(explained[1:rank].tolist())]
        ranks = dict.fromkeys(singular, 1)
        for *_, layer in sorted(further, reverse=True)[: max(0, round(len(ranks) * rank / self.rho) - len(ranks))]:
            ranks[layer] += 1
        return ranks

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        # Inputs of fewer directions than the rank leave slots that are drawn, since with A zero too none would learn.
        b, a = torch.zeros(shape.d_out, rank), kaiming(rank, shape.d_in, generator)
        if seen is None:
            return Start(b, a)
        _, singular, vh = torch.linalg.svd(seen.double(), full_matrices=False)
        kept = min(rank, int((singular > 1e-6 * singular.max()).sum()))
        a[:kept] = vh[:kept]
        return Start(b, a)
