"""LoLDU: a trained diagonal between frozen triangular frames.

Shi et al., *LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning*,
arXiv:2410.13618.

    W x + s B diag(d) A x        B = P L[:, :r]   A = U[:r]   of P L D U = W        d  r

Linear in d, and so exact under a mean: r values a layer. The paper starts d at D, and takes what it adds off the frozen
weight; the difference from there is trained here, from zero, which is the same model over an untouched 4-bit base. Its
second trained scalar, a factor of the whole update, is left out: with it the update is linear in neither.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.diagonal import Followed
from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors


@dataclass(frozen=True, kw_only=True)
class Loldu(Structure):
    """Frozen factors with a diagonal between them; linear in it."""

    name = "loldu"
    paper = "arXiv:2410.13618"
    parts = FACTORS | {"d"}
    trained = frozenset({"d"})
    linear_in = frozenset({frozenset({"d"})})
    init = "lu"
    learning_rate = 2e-2

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)
        yield "d", (rank,)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        return {"A": a, "B": b, "d": torch.zeros(len(a)) if core is None else core.diagonal().clone()}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        return tensors[Key(layer, "B")], tensors[Key(layer, "d")][:, None] * tensors[Key(layer, "A")]

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        down = module.lora_A["default"] = Followed(module.lora_A["default"])
        return {
            "A": [down.linear.weight],
            "B": [module.lora_B["default"].weight],
            "d": [down.diagonal.weight],
        }
