"""AdamW: Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, arXiv:1711.05101; torch's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.optimizer import Group, Optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Torch's AdamW over all that is trained."""

    weight_decay: float = option(0.0, ge=0, le=100)
    """The decoupled weight decay of all that is trained; 0 for none."""

    name = "adamw"
    paper = "arXiv:1711.05101"

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": list(adapter.parameters)},
            {"params": list(head.parameters), "lr": head.rate},
        ]
        return torch.optim.AdamW(groups, lr=adapter.rate, weight_decay=self.weight_decay)
