"""LoRA-Pro over several layers: each is adjusted by its own factors, and by the scale that it counts with."""

import torch
from torch import nn

from common.adapter.structure import Pair
from strategies.optimizers.lora_pro import LoraPro
from strategies.optimizers.optimizer import Group


def onto(columns):
    """The projection on the space of some columns."""
    return columns @ torch.linalg.pinv(columns)


def test_every_layer_is_adjusted_by_its_own_factors_and_scale():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) for d_out, d_in in ((9, 7), (6, 11))]
    pairs = [
        Pair(*(nn.Parameter(torch.randn(*size, generator=generator).double()) for size in sizes), scale)
        for sizes, scale in ((((9, 3), (3, 7)), 0.5), (((6, 3), (3, 11)), 4.0))
    ]
    factors = [factor for pair in pairs for factor in (pair.b, pair.a)]
    optimizer = LoraPro(damping=1e-12).build(pairs, Group(factors, 0.0), Group([], 0.0))
    for pair, gradient in zip(pairs, drawn, strict=True):
        pair.b.grad, pair.a.grad = pair.scale * gradient @ pair.a.detach().T, pair.scale * pair.b.detach().T @ gradient
    optimizer.step()
    for pair, gradient in zip(pairs, drawn, strict=True):
        b, a = pair.b.detach(), pair.a.detach()
        reached = pair.scale * (b @ pair.a.grad + pair.b.grad @ a)
        left = torch.eye(len(b)) - onto(b)
        torch.testing.assert_close(reached, gradient - left @ gradient @ (torch.eye(a.shape[1]) - onto(a.T)))
