"""A linear layer that hands over, in the backward pass, what its per-example gradients are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Record = Callable[[nn.Linear, Tensor, Tensor], None]
"""Takes a layer, its input (N x ... x d_in), and the gradient of its output (N x ... x d_out)."""


def recorded(layer: nn.Linear, record: Record, x: Tensor) -> Tensor:
    """The layer's output; its weight's ordinary gradient is left out, and ``record`` called in its place."""
    if not torch.is_grad_enabled():
        return linear(x, layer.weight, layer.bias)
    # The weight is an argument so that the layer has a gradient even where its input needs none.
    output: Tensor = _Linear.apply(x, layer.weight, layer, record)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    """A linear layer whose backward pass records in the place of forming the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: nn.Linear, record: Record) -> Tensor:
        ctx.save_for_backward(x)
        # The layer itself: under gradient checkpointing a saved parameter comes back as another object.
        ctx.layer, ctx.record = layer, record
        return linear(x, weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (g,) = outputs
        ctx.record(ctx.layer, ctx.saved_tensors[0], g)
        return g @ ctx.layer.weight if ctx.needs_input_grad[0] else None, None, None, None
