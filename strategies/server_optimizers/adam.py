"""Adam on the server: Reddi et al., *Adaptive Federated Optimization*, arXiv:2003.00295, algorithm 2.

    D = mean - x
    m <- momentum m + (1 - momentum) D,   v <- beta v + (1 - beta) D^2,   x <- x + rate m / (sqrt v + tau)

v starts at tau^2, as in the paper, and there is no bias correction.
"""

from dataclasses import dataclass, replace

import torch

from common.adapter.algebra import towards
from common.adapter.values import VARIANCE, State, Tensors
from common.method import option
from strategies.server_optimizers.momentum import MOMENTUM
from strategies.server_optimizers.server_optimizer import ServerOptimizer


@dataclass(frozen=True, kw_only=True)
class FedAdam(ServerOptimizer):
    """Adam, with the server's memory of each tensor."""

    rate: float = option(1e-3, gt=0)
    """The server's learning rate."""
    momentum: float = option(0.9, ge=0, lt=1)
    """The decay of the first moment; 0 for no momentum."""
    beta: float = option(0.99, ge=0, lt=1)
    """The decay of the second moment."""
    tau: float = option(1e-3, gt=0)
    """What is added to the root of the second moment: the larger, the less the steps adapt."""

    name = "adam"
    paper = "arXiv:2003.00295"

    def step(self, state: State, mean: Tensors) -> State:
        first, second = dict(state.memory.get(MOMENTUM, {})), dict(state.memory.get(VARIANCE, {}))
        moved: Tensors = {}
        for key, tensor in mean.items():
            change = tensor - state.adapter[key]
            first[key] = towards(change, first.get(key, torch.zeros_like(change)), self.momentum)
            start = second.get(key, torch.full_like(change, self.tau**2))
            second[key] = towards(change.square(), start, self.beta)
            moved[key] = state.adapter[key] + self.rate * first[key] / (second[key].sqrt() + self.tau)
        memory = {**state.memory, MOMENTUM: first, VARIANCE: second}
        return replace(state, adapter={**state.adapter, **moved}, memory=memory)
