"""DoRA: the direction of a layer's weights by a LoRA, and their magnitude by itself.

Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv:2402.09353 (ICML 2024), equation 5 and section 4.3.

    b + diag(m / |V|) V x        V = W + s B A        |V|  the norm of each row, d_out        m = n (1 + s g)

    A  r x d_in   B  d_out x r   g  d_out, starts at 0        n = |W|  d_out, frozen

|V| is a constant to the gradient, as the paper proposes and PEFT does. m is trained here by g, its change as a share of
|W|, so that the base model is where A and B are said to start, whatever the size of a row. |V| is not taken from the
unpacked W + s B A, as in PEFT, but from n and the images of the rows of A under the frozen layer:

    |V|^2 = n^2 + 2 s diag(B (W A^T)^T) + s^2 diag(B A A^T B^T)

Linear in g alone: a mean of A, B and g is not exact. A coordinator has to read the base's weights for n, which is sent
to each node once. Dropout is of what goes into A, and not of what goes into W.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.adapter.diagonal import Followed
from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors

LEAST = 1e-6
"""The norm of a row of zeros."""


@dataclass(frozen=True, kw_only=True)
class Dora(Structure):
    """A LoRA for the direction of each row, and a diagonal for its length; linear in the diagonal."""

    name = "dora"
    paper = "arXiv:2402.09353"
    parts = FACTORS | {"g", "n"}
    trained = FACTORS | {"g"}
    measured = frozenset({"n"})
    linear_in = frozenset({frozenset({"g"})})
    form = "DORA"
    unloadable = frozenset({"int8", "gptq", "awq"})
    cored = False

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)
        yield "g", (shape.d_out,)
        yield "n", (shape.d_out,)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        return {"A": a, "B": b, "g": torch.zeros(len(b)), "n": torch.ones(len(b))}

    def measure(self, weight: Tensor) -> Mapping[str, Tensor]:
        return {"n": weight.norm(dim=1).clamp(min=LEAST)}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        """To first order, in which |V| is |W|, over a weight whose rows have their norms and one direction."""
        b, a, g, n = (tensors[Key(layer, part)] for part in "BAgn")
        return torch.cat([b, (g * n)[:, None]], dim=1), torch.cat([a, normalize(a[:1])])

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        up = module.lora_B["default"] = Measured(module.lora_B["default"])
        module.lora_variant["default"] = Direction()
        return {
            "A": [module.lora_A["default"].weight],
            "B": [up.linear.weight],
            "g": [up.diagonal.weight],
            "n": [up.norms],
        }


class Measured(Followed):
    """PEFT's ``lora_B`` with a diagonal behind it, and the norms of the frozen weight's rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.norms = nn.Parameter(torch.ones_like(self.diagonal.weight))


class Direction:
    """What PEFT asks for the output of a layer that has a variant, in the place of ``result + s B A x``."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``b + diag(m / |V|) V x``, from the frozen layer's ``result``, ``W x + b``."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale, frozen = module.scaling[active_adapter], module.get_base_layer()
        bias = 0.0 if frozen.bias is None else frozen.bias
        change = scale * up.linear(down(module.lora_dropout[active_adapter](x)))
        turned = (result - bias + change) * (up.norms / norms(frozen, up, down.weight, scale, result.dtype))
        lengthened: Tensor = bias + turned + scale * up.diagonal(turned)
        return lengthened


@torch.no_grad()
def norms(frozen: Any, up: Measured, a: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """|V|, with the frozen layer computed in ``dtype``."""
    b, bias = up.weight, 0.0 if frozen.bias is None else frozen.bias
    images = (frozen(a.to(dtype)) - bias).to(b.dtype)
    grown: Tensor = 2 * scale * (b * images.T).sum(1) + scale**2 * ((b @ (a @ a.T)) * b).sum(1)
    return (up.norms.square() + grown).clamp(min=LEAST**2).sqrt()
