"""Server momentum: Hsu, Qi, Brown, arXiv:1909.06335.

D = mean - x        m <- momentum m + D        x <- x + rate m
"""

from dataclasses import dataclass, replace

import torch

from common.adapter.values import State, Tensors
from common.method import option
from strategies.server_optimizers.server_optimizer import ServerOptimizer

MOMENTUM = "momentum"
"""The name of m in the server's memory."""


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerOptimizer):
    """A ``rate`` of 1 without momentum is plain averaging."""

    rate: float = option(1.0, gt=0)
    """The server's learning rate; 1 without momentum is plain averaging."""
    momentum: float = option(0.9, ge=0, lt=1)
    """How much of the velocity a round leaves; 0 for no momentum."""

    name = "momentum"
    paper = "arXiv:1909.06335"

    def step(self, state: State, mean: Tensors) -> State:
        old = state.memory.get(MOMENTUM, {})
        velocity = {
            key: self.momentum * old.get(key, torch.zeros_like(tensor)) + tensor - state.adapter[key]
            for key, tensor in mean.items()
        }
        moved = {key: state.adapter[key] + self.rate * tensor for key, tensor in velocity.items()}
        memory = {**state.memory, MOMENTUM: {**old, **velocity}}
        return replace(state, adapter={**state.adapter, **moved}, memory=memory)
