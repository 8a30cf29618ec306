"""Per-example gradients from one backward pass, in the place of the ordinary ones.

Book-keeping (Bu et al., *Differentially Private Optimization on Large Foundation Models at Little Cost*,
arXiv:2210.00038), cut to LoRA. In the one backward pass a trained linear layer ``y = x W^T + b`` hands over its input
``x`` (N x T x d_in) and the gradient of its output ``g`` (N x T x d_out), and leaves its ordinary weight gradient out:

    G_i = sum_t g_it x_it^T        of a diagonal, y = d * x:  G_i = sum_t g_it * x_it

which is small, because LoRA's factors are. Ghost clipping, which never forms it, is not offered: a crafted state
pulls its norms and what it sums apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from common.adapter.diagonal import Diagonal
from common.error import BouquetError
from strategies.gradients.engine import Engine, Rows, folded
from strategies.gradients.gradient import Gradient

Trained = nn.Linear | Diagonal


class Kind(NamedTuple):
    """A kind of layer: ``x`` is its input (N x T x d_in), ``g`` the gradient of its output (N x T x d_out)."""

    output: Callable[[Any, Tensor], Tensor]
    """Of the layer and x."""
    backward: Callable[[Tensor, Tensor], Tensor]
    """The gradient of x, of g and the weight."""
    examples: Callable[[Tensor, Tensor], Tensor]
    """The gradient of the weight for each of N examples, of g and x."""


KINDS: Mapping[type, Kind] = {
    nn.Linear: Kind(
        output=lambda layer, x: linear(x, layer.weight, layer.bias),
        backward=lambda g, weight: g @ weight,
        examples=lambda g, x: torch.bmm(g.mT, x),
    ),
    Diagonal: Kind(
        output=lambda layer, x: x * layer.weight,
        backward=lambda g, weight: g * weight,
        examples=lambda g, x: (g * x).sum(1),
    ),
}
"""The layers whose per-example gradients are known here, by their very type."""


class BookKeeping(Engine):
    """One backward pass that forms per-example gradients in the place of the ordinary ones."""

    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        self._gradients: dict[Tensor, Tensor] = {}
        self._examples = 0
        self._rows: Rows | None = None
        self._layers: list[nn.Module] = []
        for name, module in layers.items():
            if type(module) not in KINDS or "forward" in vars(module):
                self.__exit__()
                raise BouquetError(
                    "a trained layer is not a plain linear layer",
                    where=name,
                    expected="torch.nn.Linear, or a structure's diagonal",
                    got=f"{type(module).__module__}.{type(module).__qualname__}",
                    cure="Train LoRA factors and linear heads only, or set gradient.name = 'hooks'.",
                )
            module.forward = partial(recorded, cast(Trained, module), self._record)
            self._layers.append(module)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for module in self._layers:
            del module.forward
        self._layers.clear()

    def forget(self) -> None:
        super().forget()
        self._gradients = {}

    def _record(self, layer: Trained, x: Tensor, g: Tensor) -> None:
        if self._rows is not None:
            x, g = self._rows(x), self._rows(g)
        if len(x) != self._examples:
            raise folded(f"an input of {self._examples} x ... x {x.shape[-1]}", x)
        x, g = (tensor.reshape(len(tensor), -1, tensor.shape[-1]).float() for tensor in (x, g))
        if layer.weight.requires_grad:
            self._keep(layer.weight, KINDS[type(layer)].examples(g, x))
        bias = getattr(layer, "bias", None)
        if bias is not None and bias.requires_grad:
            self._keep(bias, g.sum(1))

    def _keep(self, parameter: Tensor, gradient: Tensor) -> None:
        # A layer that is used twice has one gradient: the parts are added before the norm is taken.
        if parameter in self._gradients:
            self._gradients[parameter] += gradient
        else:
            self._gradients[parameter] = gradient

    def _sum(self, losses: Tensor, units: Tensor | None, rows: Rows | None) -> Mapping[Tensor, Tensor]:
        self._examples, self._rows = len(losses if units is None else units), rows
        torch.autograd.backward(losses.sum())
        gradients, self._gradients = self._gradients, {}
        self._check(gradients)
        return self._clipped(gradients, units)


@dataclass(frozen=True, kw_only=True)
class Fast(Gradient):
    """The fast engine, for linear layers and diagonals."""

    name = "fast"
    paper = "arXiv:2210.00038"
    engine = BookKeeping


Record = Callable[[Trained, Tensor, Tensor], None]
"""Takes a layer, its input (N x ... x d_in), and the gradient of its output (N x ... x d_out)."""


def recorded(layer: Trained, record: Record, x: Tensor) -> Tensor:
    """The layer's output; its weight's ordinary gradient is left out, and ``record`` called in its place."""
    if not torch.is_grad_enabled():
        return KINDS[type(layer)].output(layer, x)
    # The weight is an argument so that the layer has a gradient even where its input needs none.
    output: Tensor = _Recorded.apply(x, layer.weight, layer, record)  # type: ignore[no-untyped-call]
    return output


class _Recorded(torch.autograd.Function):
    """A layer whose backward pass records in the place of forming the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Trained, record: Record) -> Tensor:
        ctx.save_for_backward(x)
        # The layer itself: under gradient checkpointing a saved parameter comes back as another object.
        ctx.layer, ctx.record = layer, record
        return KINDS[type(layer)].output(layer, x)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (g,) = outputs
        ctx.record(ctx.layer, ctx.saved_tensors[0], g)
        kind, weight = KINDS[type(ctx.layer)], ctx.layer.weight
        return kind.backward(g, weight) if ctx.needs_input_grad[0] else None, None, None, None
