"""LoRA: two trained factors. Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685.

W x + s B A x        A  r x d_in        B  d_out x r
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors


@dataclass(frozen=True, kw_only=True)
class Lora(Structure):
    """The factors themselves; linear in either."""

    name = "lora"
    paper = "arXiv:2106.09685"
    parts = FACTORS
    trained = FACTORS
    linear_in = frozenset({frozenset({"A"}), frozenset({"B"})})

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        return {"A": a, "B": b if core is None else b @ core}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        return tensors[Key(layer, "B")], tensors[Key(layer, "A")]

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        return {"A": [module.lora_A["default"].weight], "B": [module.lora_B["default"].weight]}
