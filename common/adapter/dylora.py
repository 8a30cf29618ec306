"""DyLoRA: every leading part of a LoRA is trained to do without the rest.

Valipour et al., *DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation*, arXiv:2210.07558 (EACL 2023).

    W x + s B[:, :b] A[:b] x        b drawn from 1..r in every step, the same one for all layers and nodes

All of the b slots learn in a step; the paper's other variant, in which only the last of them does, is not built.
Whoever computes without training has all slots. The paper's code scales a part of b slots by alpha / b. Here every part
keeps the scale of the whole, so that the leading slots are one model, for a node of a smaller rank as for an export
that is cut.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.lora import Lora


@dataclass(frozen=True, kw_only=True)
class DyLora(Lora):
    """A LoRA whose leading slots are drawn anew in every step."""

    name = "dylora"
    paper = "arXiv:2210.07558"
    nested = True

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        down = module.lora_A["default"] = NestedDown(module.lora_A["default"])
        return {"A": [down.down.weight], "B": [module.lora_B["default"].weight]}

    def step(self, module: Any, draw: int) -> None:
        down = module.lora_A["default"]
        down.slots.fill_(1 + draw % down.down.out_features)


class NestedDown(nn.Module):
    """PEFT's ``lora_A``, of which only the leading ``slots`` are computed with in training.

    They are a tensor, so that a compiled model is one and the same in every step.
    """

    slots: Tensor

    def __init__(self, down: nn.Linear) -> None:
        super().__init__()
        self.down = down
        self.register_buffer("slots", torch.tensor(down.out_features, device=down.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """A; PEFT reads its type."""
        return self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """``A x`` with zeros after the leading slots, ``... x d_in`` to ``... x r``."""
        y: Tensor = self.down(x)
        if not self.training:
            return y
        number = torch.arange(y.shape[-1], device=y.device)
        return torch.where(number < self.slots, y, 0.0)
