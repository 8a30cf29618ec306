"""SLoRA and NLoRA: a third factor, trained between the two of LoRA.

Guo et al., *NLoRA: Nystrom-Initiated Low-Rank Adaptation for Large Language Models*, arXiv:2502.14482.

    W x + s B R A x        A  r x d_in   B  d_out x r   R  r x r        all trained

The paper's SLoRA starts at B = 0, its NLoRA from columns and rows of the weight (``init.name = "nystrom"``). Where an
init puts nothing between the factors, R starts at the identity here; the paper draws it. The third method, IntTune,
trains R alone: that is the structure ``core`` from a Nystrom start, and the only one of the three whose mean is exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.core import CoredDown
from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors


@dataclass(frozen=True, kw_only=True)
class NLora(Structure):
    """Three trained factors; linear in each."""

    name = "nlora"
    paper = "arXiv:2502.14482"
    parts = FACTORS | {"R"}
    trained = FACTORS | {"R"}
    linear_in = frozenset({frozenset({"A"}), frozenset({"B"}), frozenset({"R"})})

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)
        yield "R", (rank, rank)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        return {"A": a, "B": b, "R": torch.eye(len(a)) if core is None else core}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        b, r, a = (tensors[Key(layer, part)] for part in "BRA")
        return b, r @ a

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        cored = module.lora_A["default"] = CoredDown(module.lora_A["default"], blocks=1)
        return {
            "A": [cored.down.weight],
            "B": [module.lora_B["default"].weight],
            "R": [block.weight for block in cored.blocks],
        }
