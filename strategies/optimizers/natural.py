"""Natural gradients from a short memory: what recent gradients share is damped, whatever is new is not.

Das, *Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning*, arXiv:2410.16029. Of
each tensor, with G (n x s) the last s gradients, flattened, this step's among them:

    g' = lambda (lambda I + G G^T)^-1 g = g - G (lambda I + G^T G)^-1 G^T g

by Woodbury's identity, in a system of s x s. AdamW steps along g'. The paper projects the gradients of whole weights
first, as GaLore does; LoRA's are small as they are, and a 4-bit base has no others. The paper's g' is longer by
1 / lambda, which Adam takes off again, and its lambda is a number; here it is ``damping`` times the mean squared length
of the columns of G, so that nothing depends on the scale of the loss. Takes ``memory`` times the adapter's size.
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

RECENT = "recent"


@dataclass(frozen=True, kw_only=True)
class Natural(AdamW):
    """AdamW along natural gradients, of a Fisher matrix of the last few."""

    memory: int = option(8, ge=1, le=64)
    """How many gradients are remembered, this step's among them."""
    damping: float = option(1.0, gt=0, le=1e6)
    """What is added to the Fisher matrix's diagonal, in units of a gradient's squared length."""

    name = "natural"
    paper = "arXiv:2410.16029"

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        optimizer = super().build(pairs, adapter, head)
        recent: dict[Tensor, Tensor] = {}

        @torch.no_grad()
        def before(*_: Any) -> None:
            for parameter in adapter.parameters:
                if parameter.grad is not None:
                    past = optimizer.state.get(parameter, {}).get(RECENT, parameter.grad[None][:0])
                    kept = past[max(0, len(past) - self.memory + 1) :]
                    recent[parameter] = torch.cat([kept, parameter.grad[None]])
                    parameter.grad = natural(recent[parameter], self.damping)

        def after(*_: Any) -> None:
            # Only now: AdamW begins a state of its own where there is none.
            for parameter, gradients in recent.items():
                optimizer.state[parameter][RECENT] = gradients
            recent.clear()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer


def natural(recent: Tensor, damping: float) -> Tensor:
    """The newest of ``recent`` gradients (``s x ...``), in the metric of all of them; zeros where they are."""
    gradients = recent.flatten(1).double()
    gram = gradients @ gradients.T
    ridge = (damping * gram.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    shares = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), gram[:, -1])
    found: Tensor = gradients[-1] - shares @ gradients
    return found.view_as(recent[-1]).to(recent.dtype)
