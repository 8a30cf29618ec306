"""LA-LoRA: the factors in turns within a round, along gradients without their high frequencies.

*LA-LoRA*, arXiv:2602.19926 (ICLR 2026).

    steps 1, 3, 5, ...   B alone is trained        steps 2, 4, 6, ...   A alone
    g <- (1, 4, 6, 4, 1) / 16 * g        along each row of A's gradient and each column of B's, mirrored at the ends

Under privacy an example's gradient is clipped over the factor of the step alone, and only that is noised, so that no
noise of one factor multiplies the other's within a step; the filter is free. Features have no natural order: it is a
fixed preconditioner that also removes signal, and ``filter`` = 0 leaves the turns alone. AdamW steps. The published
code is another method: it begins with A, where B = 0 leaves nothing but noise, clips the mean of a batch, not each
example, and smooths over the rank as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.optimizer import Group

TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


@dataclass(frozen=True, kw_only=True)
class LaLora(AdamW):
    """AdamW over B and A in turns."""

    filter: int = option(1, among=(0, 1))
    """1 smooths the gradients along the features, 0 leaves them as they are."""

    name = "la-lora"
    paper = "arXiv:2602.19926"
    pairwise = True

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        optimizer = super().build(pairs, adapter, head)

        def before(*_: Any) -> None:
            for pair in pairs:
                if pair.a.grad is not None:
                    pair.a.grad = smoothed(pair.a.grad)
                if pair.b.grad is not None:
                    pair.b.grad = smoothed(pair.b.grad.T).T

        if self.filter:
            optimizer.register_step_pre_hook(before)
        return optimizer

    @classmethod
    def rests(cls, step: int) -> frozenset[str]:
        """A in the first step, B in the second, and so on."""
        return frozenset({"A" if step % 2 == 0 else "B"})


def smoothed(rows: Tensor) -> Tensor:
    """Each row under the binomial filter; beyond its ends it is mirrored."""
    width, reach = rows.shape[-1], min(len(TAPS) // 2, rows.shape[-1])
    wide = torch.cat([rows[:, :reach].flip(-1), rows, rows[:, -reach:].flip(-1)], dim=-1)
    return sum(tap * wide[:, start : start + width] for start, tap in enumerate(TAPS))  # type: ignore[return-value]
