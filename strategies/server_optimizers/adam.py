"""Adam on the server: Reddi et al., *Adaptive Federated Optimization*, arXiv:2003.00295, algorithm 2.

    D = mean - x
    m <- momentum m + (1 - momentum) D,   v <- beta v + (1 - beta) D^2,   x <- x + rate m / (sqrt v + tau)

v starts at tau^2, as in the paper, and there is no bias correction.
"""

from dataclasses import dataclass, replace

import torch

from common.adapter.algebra import towards
from common.adapter.values import VARIANCE, State, Tensors
from strategies.server_optimizers.momentum import MOMENTUM
from strategies.server_optimizers.server_optimizer import ServerOptimizer


@dataclass(frozen=True, kw_only=True)
class FedAdam(ServerOptimizer):
    """Adam, with the server's memory of each tensor."""

    rate: float = 1e-3
    momentum: float = 0.9
    beta: float = 0.99
    tau: float = 1e-3

    name = "adam"
    paper = "arXiv:2003.00295"

    def __post_init__(self) -> None:
        self._demand("rate", self.rate > 0, "more than 0")
        self._demand("momentum", 0 <= self.momentum < 1, "0 or more, less than 1")
        self._demand("beta", 0 <= self.beta < 1, "0 or more, less than 1")
        self._demand("tau", self.tau > 0, "more than 0")

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
