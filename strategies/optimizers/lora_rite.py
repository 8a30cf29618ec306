"""LoRA-RITE: Adam for a pair of factors that moves the layer alike whatever is in B and what in A.

Yen et al., *LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization*, arXiv:2410.20625
(ICLR 2025), algorithm 1. For B (A^T likewise, with the roles exchanged), in step t:

    U R = qr(A^T)                   U  d_in x r,  R  r x r,  upper
    g   = gB R^-1                   the gradient without A's magnitude
    P   = U_t^T U_(t-1)             how the basis has turned
    V  <- b2 P V P^T + (1 - b2) g^T g / d_out
    M  <- b1 M P^T + (1 - b1) g (V + eps I)^(-1/2)
    B  <- B - rate M R^-T

with decays b' = b (1 - b^(t-1)) / (1 - b^t), which correct the bias. Exchanging B, A for B T, T^-1 A changes nothing of
B A, as a server that decomposes the merged model does in every round. The published code also skips steps and clips
them; the run's own clipping stands here. Where the other factor has next to nothing in some direction, as B has in
its first steps, nothing moves along it, since R^-1 would magnify rounding. What is no pair (a head) is AdamW's.
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

BETAS = (0.9, 0.999)
SMALLEST = 1e-3
"""Of the other factor's singular values, in the largest: along smaller ones a factor does not move."""


@dataclass(frozen=True, kw_only=True)
class LoraRite(AdamW):
    """The invariant step for factors, AdamW for the rest."""

    eps: float = option(1e-6, gt=0, le=1)
    """What is added to the second moment's eigenvalues."""

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
                b, a = pair.b.double(), pair.a.double()
                for factor, other in ((pair.b, a.T), (pair.a, b)):
                    if factor.grad is None:
                        continue
                    # A stands on its side: all that is done is done to columns of slots.
                    upright = Upright(optimizer.state[factor], lying=factor is pair.a)
                    factor.sub_((rate * upright.step(factor.grad, other, self.eps)).to(factor.dtype))
                    factor.grad = None  # AdamW leaves it alone

        optimizer.register_step_pre_hook(before)
        return optimizer


@dataclass(frozen=True)
class Upright:
    """The ``state`` of a factor, seen as ``d x r``; one that is ``lying``, as A is, is ``r x d`` itself."""

    state: dict[str, Any]
    lying: bool

    def step(self, gradient: Tensor, other: Tensor, eps: float) -> Tensor:
        """The direction of the factor, in its own shape, beside the ``other`` one, ``d' x r``; the state goes on."""
        basis, magnitude = torch.linalg.qr(other)
        inverse = torch.linalg.pinv(magnitude, rtol=SMALLEST)
        plain = self._turned(gradient.double()) @ inverse
        count = int(self.state.get("step", 0)) + 1
        decay_first, decay_second = (beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in BETAS)
        first, second = torch.zeros_like(plain), torch.zeros_like(magnitude)
        if count > 1:
            change = basis.T @ self.state["basis"].double()
            first = self._turned(self.state["first"].double()) @ change.T
            second = change @ self.state["second"].double() @ change.T
        second = decay_second * second + (1 - decay_second) * plain.T @ plain / len(plain)
        values, vectors = torch.linalg.eigh(second)
        equal = vectors @ torch.diag((values.clamp_min(0) + eps).rsqrt()) @ vectors.T
        first = decay_first * first + (1 - decay_first) * plain @ equal
        # In the factor's own type and shape, as an optimizer's state is kept.
        kept = {"basis": basis, "second": second, "first": self._turned(first)}
        self.state.update({name: tensor.to(gradient.dtype) for name, tensor in kept.items()})
        self.state["step"] = torch.tensor(float(count))
        return self._turned(first @ inverse.T)

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.lying else tensor
