"""LoRA-RITE: Adam for a pair of factors that moves the layer alike whatever is in B and what in A.

Yen et al., *LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization*, arXiv:2410.20625
(ICLR 2025), algorithm 1. For B (A^T likewise, with the roles exchanged), in step t:

    U R = qr(A^T)                   U  d_in x r,  R  r x r,  upper, of singular values of ``least`` at least
    g   = gB R^-1                   the gradient without A's magnitude
    P   = U_t^T U_(t-1)             how the basis has turned
    V  <- b2 P V P^T + (1 - b2) g^T g / d_out
    M  <- b1 M P^T + (1 - b1) g (V + eps I)^(-1/2)
    B  <- B - rate M R^-T

with decays b' = b (1 - b^(t-1)) / (1 - b^t), which correct the bias. Exchanging B, A for B T, T^-1 A changes nothing of
B A, as a server that decomposes the merged model does in every round. A factor that is next to nothing, as B is where
a layer has had next to no gradient, would let the other one's step grow without bound: below ``least`` a singular value
counts as that. The published code skips steps and clips them instead. What is no pair (a head) is AdamW's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.optimizer import Group

BETAS = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class LoraRite(AdamW):
    """The invariant step for factors, AdamW for the rest."""

    eps: float = option(1e-6, gt=0, le=1)
    """What is added to the second moment's eigenvalues."""
    least: float = option(1e-3, gt=0, le=1)
    """The least singular value of a factor that the other one's step is divided by."""

    name = "lora-rite"
    paper = "arXiv:2410.20625"
    pairwise = True

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        optimizer = super().build(pairs, adapter, head)

        @torch.no_grad()
        def before(*_: Any) -> None:
            rate = optimizer.param_groups[0]["lr"]
            for pair in pairs:
                # Both before either is moved: each sees the other as the gradients did.
                b, a = pair.b.double(), pair.a.double().T
                if pair.b.grad is not None:
                    step = _step(optimizer.state[pair.b], pair.b.grad.double(), a, self)
                    _move(pair.b, -rate * step)
                if pair.a.grad is not None:
                    step = _step(optimizer.state[pair.a], pair.a.grad.double().T, b, self)
                    _move(pair.a, -rate * step.T)

        optimizer.register_step_pre_hook(before)
        return optimizer


def _step(state: dict[str, Any], gradient: Tensor, other: Tensor, options: LoraRite) -> Tensor:
    """The direction of a factor (``d x r``) beside the ``other`` one (``d' x r``), and the ``state`` after it."""
    basis, magnitude = torch.linalg.qr(other)
    left, singular, right = torch.linalg.svd(magnitude)
    inverse = right.T @ torch.diag(1 / singular.clamp_min(options.least)) @ left.T
    turned = basis.T @ state.get("basis", basis)
    count = int(state.get("step", 0)) + 1
    decay_first, decay_second = (beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in BETAS)
    plain = gradient @ inverse
    second = (1 - decay_second) * plain.T @ plain / len(plain)
    first = (1 - decay_first) * plain
    if count > 1:
        second = second + decay_second * turned @ state["second"] @ turned.T
    values, vectors = torch.linalg.eigh(second)
    first = first @ vectors @ torch.diag((values.clamp_min(0) + options.eps).rsqrt()) @ vectors.T
    if count > 1:
        first = first + decay_first * state["first"] @ turned.T
    state.update(step=torch.tensor(float(count)), basis=basis, second=second, first=first)
    direction: Tensor = first @ inverse.T
    return direction


def _move(factor: nn.Parameter, change: Tensor) -> None:
    """Move a factor here, so that AdamW leaves it alone."""
    factor.add_(change.to(factor.dtype))
    factor.grad = None
