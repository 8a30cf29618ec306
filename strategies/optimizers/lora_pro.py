"""LoRA-Pro: gradients of the factors whose step is the nearest to that of full fine-tuning.

Wang et al., *LoRA-Pro: Are Low-Rank Adapters Properly Optimized?*, arXiv:2407.18242 (ICLR 2025), theorem 2.2. With s
the scale, and gA, gB the gradients of the factors,

    gA' = 1/s^2 (B^T B)^-1 gA + X A
    gB' = 1/s^2 (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 - B X        B^T B X + X A A^T = -1/s^2 (B^T B)^-1 gA A^T

Whatever X is, the layer's own gradient becomes g - (I - P_B) g (I - P_A); this X moves the factors the least. AdamW
steps along gA' and gB'. The published code keeps the moments of the whole ``d_out x d_in`` gradient instead, for which
a node with a 4-bit base has no memory, and takes s = 2 for granted.

The Gram matrices are damped, by ``damping`` times their mean diagonal: B starts at zero, and the noise of a private run
must not be magnified without bound. Where B is zero, A has no gradient to adjust. Where a factor is frozen, the other's
step is its gradient times the frozen one's inverse Gram matrix, over s^2.
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
class LoraPro(AdamW):
    """AdamW along the adjusted gradients."""

    damping: float = option(1e-3, gt=0)
    """What is added to the Gram matrices' diagonals, in units of their mean."""

    name = "lora-pro"
    paper = "arXiv:2407.18242"
    pairwise = True

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        optimizer = super().build(pairs, adapter, head)

        def before(*_: Any) -> None:
            for pair in pairs:
                adjust(pair, self.damping)

        optimizer.register_step_pre_hook(before)
        return optimizer


@torch.no_grad()
def adjust(pair: Pair, damping: float) -> None:
    """Replace the gradients of a layer's factors by the adjusted ones."""
    b, a, square = pair.b.double(), pair.a.double(), pair.scale**2
    gram_b, gram_a = _damped(b.T @ b, damping), _damped(a @ a.T, damping)
    grad_b, grad_a = (None if factor.grad is None else factor.grad.double() for factor in (pair.b, pair.a))
    if grad_a is not None and b.any():
        grad_a = torch.linalg.solve(gram_b, grad_a) / square
    if grad_b is not None:
        if grad_a is not None and b.any():
            grad_b = grad_b - b @ torch.linalg.solve(gram_b, b.T @ grad_b)
        grad_b = torch.linalg.solve(gram_a, grad_b.T).T / square
    if grad_a is not None and grad_b is not None and b.any():
        x = sylvester(gram_b, gram_a, -grad_a @ a.T)
        grad_a, grad_b = grad_a + x @ a, grad_b - b @ x
    for factor, gradient in ((pair.b, grad_b), (pair.a, grad_a)):
        if gradient is not None:
            factor.grad = gradient.to(factor.dtype)


def sylvester(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """X with ``left X + X right = total``, for symmetric positive definite ``left`` and ``right``; all r x r."""
    values_left, u = torch.linalg.eigh(left)
    values_right, v = torch.linalg.eigh(right)
    solution: Tensor = u @ ((u.T @ total @ v) / (values_left[:, None] + values_right[None, :])) @ v.T
    return solution


def _damped(gram: Tensor, damping: float) -> Tensor:
    mean = gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
