"""ALLoRA: rows of B move the faster the nearer to zero they are.

Huang, Balestriero, *ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws*, arXiv:2410.09692.

    row i of B moves 1 / sqrt(|B_i| + 1 / eta^2) times as far        eta where B_i is zero

The paper scales the gradient, which Adam's normalisation undoes; here the step of AdamW is scaled, so that each row has
a rate of its own. The factor is found anew in every step. The published code finds it once, where B is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.optimizer import Group


@dataclass(frozen=True, kw_only=True)
class AlLora(AdamW):
    """AdamW, with a rate for each row of B."""

    eta: float = option(2.0, gt=0, le=100)
    """How many times the rate a row of zeros moves at."""

    name = "allora"
    paper = "arXiv:2410.09692"
    pairwise = True

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        optimizer = super().build(pairs, adapter, head)
        before: list[Tensor] = []

        def remember(*_: Any) -> None:
            before[:] = [pair.b.detach().clone() for pair in pairs]

        @torch.no_grad()
        def rescale(*_: Any) -> None:
            for pair, start in zip(pairs, before, strict=True):
                factor = (start.norm(dim=1, keepdim=True) + self.eta**-2).rsqrt()
                pair.b.copy_(start + factor * (pair.b - start))

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(rescale)
        return optimizer
