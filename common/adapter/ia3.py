"""(IA)^3: a trained diagonal on what a frozen layer gives.

Liu et al., *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning*, arXiv:2205.05638
(NeurIPS 2022), section 3.3.

    (1 + s g) * (W x + b)        g  d_out, starts at 0        the paper's l is 1 + s g

d_out values a layer, and linear in them, so that a mean is exact. The update of the weight, s diag(g) W, has the rank
of W: no LoRA holds it, and what a run leaves is an IA3 adapter of PEFT's. A and B stand still beside it and are not
computed with; B is zero.

The paper scales keys, values, and what goes into the last layer of the feed-forward. Here every layer that is adapted
is scaled where it ends: ``lora.targets = "k_proj,v_proj,up_proj"`` is the paper's choice for a gated feed-forward, in
which what ``up_proj`` gives is multiplied by the gate.
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
class IA3(Structure):
    """A diagonal on a frozen layer's output; linear in it."""

    name = "ia3"
    paper = "arXiv:2205.05638"
    parts = FACTORS | {"g"}
    trained = frozenset({"g"})
    linear_in = frozenset({frozenset({"g"})})
    form = "IA3"
    unloadable = frozenset({"gptq", "awq"})
    cored = False
    init = "orthonormal"
    learning_rate = 5e-2

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)
        yield "g", (shape.d_out,)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        return {"A": a, "B": torch.zeros_like(b), "g": torch.zeros(len(b))}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        """What diag(g) makes of a weight whose rows are a row of A."""
        return tensors[Key(layer, "g")][:, None], tensors[Key(layer, "A")][:1]

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        up = module.lora_B["default"] = Followed(module.lora_B["default"])
        module.lora_variant["default"] = Scaling()
        return {
            "A": [module.lora_A["default"].weight],
            "B": [up.linear.weight],
            "g": [up.diagonal.weight],
        }


class Scaling:
    """What PEFT asks for the output of a layer that has a variant, in the place of ``result + s B A x``."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``(1 + s g) * result``, of what the frozen layer gives."""
        scaled: Tensor = result + module.scaling[active_adapter] * module.lora_B[active_adapter].diagonal(result)
        return scaled
