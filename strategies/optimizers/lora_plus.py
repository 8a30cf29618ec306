"""LoRA+: a larger rate for B. Hayou, Ghosh, Yu, *LoRA+: Efficient Low Rank Adaptation*, arXiv:2402.12354 (ICML 2024).

    rate of B = ratio x rate of A

As the width of a layer grows, B has to move faster than A for both to learn. The rate of the run is B's, so that a
rule's own rate holds, and a rule that trains B alone is what it is under AdamW. PEFT's is A's: what is ``lr`` there is
``ratio`` times as large here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.optimizer import Group


@dataclass(frozen=True, kw_only=True)
class LoraPlus(AdamW):
    """AdamW, with A at a ``ratio``-th of the rate of all else."""

    ratio: float = option(16.0, gt=0, le=1000)
    """How many times A's rate B's is."""

    name = "lora-plus"
    paper = "arXiv:2402.12354"
    pairwise = True

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        inner = {pair.a for pair in pairs}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in adapter.parameters if p not in inner]},
            {"params": [p for p in adapter.parameters if p in inner], "lr": adapter.rate / self.ratio},
            {"params": list(head.parameters), "lr": head.rate},
        ]
        return torch.optim.AdamW(groups, lr=adapter.rate, weight_decay=self.weight_decay)
