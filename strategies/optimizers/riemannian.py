"""Riemannian preconditioning: each factor's gradient in the metric that the other one gives it.

Zhang, Pilanci, *Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models*, arXiv:2402.02347 (ICML 2024).

    gB' = gB (A A^T + delta I)^-1        gA' = (B^T B + delta I)^-1 gA

AdamW steps along them. The layer then moves alike whatever share of it is in B and what in A. A small B magnifies what
A is moved by, noise included, which ``damping`` bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.optimizer import Group


@dataclass(frozen=True, kw_only=True)
class Riemannian(AdamW):
    """AdamW along the preconditioned gradients."""

    damping: float = option(1e-6, gt=0, le=1)
    """The paper's delta, added to the Gram matrices' diagonals."""

    name = "riemannian"
    paper = "arXiv:2402.02347"
    pairwise = True

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        optimizer = super().build(pairs, adapter, head)

        def before(*_: Any) -> None:
            for pair in pairs:
                precondition(pair, self.damping)

        optimizer.register_step_pre_hook(before)
        return optimizer


@torch.no_grad()
def precondition(pair: Pair, damping: float) -> None:
    """Replace the gradients of a layer's factors by the preconditioned ones."""
    b, a = pair.b.double(), pair.a.double()
    eye = damping * torch.eye(len(a), dtype=a.dtype, device=a.device)
    if pair.b.grad is not None:
        pair.b.grad = torch.linalg.solve(a @ a.T + eye, pair.b.grad.double().T).T.to(pair.b.dtype)
    if pair.a.grad is not None:
        pair.a.grad = torch.linalg.solve(b.T @ b + eye, pair.a.grad.double()).to(pair.a.dtype)
