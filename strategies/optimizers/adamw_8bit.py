"""AdamW with 8-bit moments: Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv:2110.02861.

A quarter of AdamW's memory beside the adapter, and on a GPU in pages that leave it when memory is short. Tensors of
fewer than 4,096 values keep their moments in 32 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.optimizer import Group, Optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(Optimizer):
    """The AdamW of bitsandbytes, whose moments take 8 bits a value."""

    weight_decay: float = option(0.0, ge=0, le=100)
    """The decoupled weight decay of all that is trained; 0 for none."""

    name = "adamw-8bit"
    paper = "arXiv:2110.02861"

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        from bitsandbytes.optim.adamw import AdamW8bit as Whole  # takes seconds to import
        from bitsandbytes.optim.adamw import PagedAdamW8bit as Paged

        groups: list[dict[str, Any]] = [
            {"params": list(group.parameters), "lr": group.rate} for group in (adapter, head) if group.parameters
        ]
        device = groups[0]["params"][0].device.type
        kind = Paged if device == "cuda" else Whole
        built: torch.optim.Optimizer = kind(groups, lr=adapter.rate, weight_decay=self.weight_decay)
        return built
