"""VeRA: two trained diagonals around frozen random factors.

Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, arXiv:2310.11454 (ICLR 2024), equation 2.

    W x + s diag(g) B diag(d) A x        d  r, starts at 0.1        g  d_out, starts at 0

r + d_out values a layer. The paper shares one pair of frames among all layers of a shape, to save memory on disk; here
every layer draws its own from the run's seed, orthonormal, and neither travels nor is stored. Linear in either diagonal
but not in both, so that a mean of both is not exact, as with LoRA's factors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.diagonal import Followed
from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors
from common.method import option


@dataclass(frozen=True, kw_only=True)
class Vera(Structure):
    """A diagonal behind each of two frozen factors."""

    start_d: float = option(0.1, gt=0, le=10)
    """Where the inner diagonal starts; the outer one starts at zero."""

    name = "vera"
    paper = "arXiv:2310.11454"
    parts = FACTORS | {"d", "g"}
    trained = frozenset({"d", "g"})
    linear_in = frozenset({frozenset({"d"}), frozenset({"g"})})
    cored = False
    init = "orthonormal"
    learning_rate = 1e-1

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)
        yield "d", (rank,)
        yield "g", (shape.d_out,)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        return {"A": a, "B": b, "d": torch.full((len(a),), self.start_d), "g": torch.zeros(len(b))}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        a, b, d, g = (tensors[Key(layer, part)] for part in "ABdg")
        return g[:, None] * b, d[:, None] * a

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        down = module.lora_A["default"] = Followed(module.lora_A["default"])
        up = module.lora_B["default"] = Followed(module.lora_B["default"])
        return {
            "A": [down.linear.weight],
            "B": [up.linear.weight],
            "d": [down.diagonal.weight],
            "g": [up.diagonal.weight],
        }
