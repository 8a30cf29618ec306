"""Server optimisation: the mean of the nodes is a direction to go, not the place to be.

Reddi et al., *Adaptive Federated Optimization*, arXiv:2003.00295, algorithm 2; Hsu, Qi, Brown, arXiv:1909.06335, for
momentum. With x the state and ``mean`` the nodes' mean,

    D = mean - x
    momentum:  m <- momentum m + D                                          x <- x + rate m
    Adam:      m <- momentum m + (1 - momentum) D,   v <- beta v + (1 - beta) D^2,   x <- x + rate m / (sqrt v + tau)

m and v are the server's memory of each tensor; v starts at tau^2, as in the paper, and there is no bias correction.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from common.adapter.algebra import towards
from common.adapter.values import State, Tensors

MOMENTUM, VARIANCE = "momentum", "variance"


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(ABC):
    """One step of the server from its state towards the mean of the nodes."""

    rate: float
    momentum: float = 0.9

    @abstractmethod
    def step(self, state: State, mean: Tensors) -> State:
        """The state after the step; tensors that ``mean`` lacks stay, and so does their memory."""


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerOptimizer):
    """Momentum; a ``rate`` of 1 without momentum is plain averaging."""

    rate: float = 1.0

    def step(self, state: State, mean: Tensors) -> State:
        old = state.memory.get(MOMENTUM, {})
        velocity = {
            key: self.momentum * old.get(key, torch.zeros_like(tensor)) + tensor - state.adapter[key]
            for key, tensor in mean.items()
        }
        moved = {key: state.adapter[key] + self.rate * tensor for key, tensor in velocity.items()}
        memory = {**state.memory, MOMENTUM: {**old, **velocity}}
        return replace(state, adapter={**state.adapter, **moved}, memory=memory)


@dataclass(frozen=True, kw_only=True)
class FedAdam(ServerOptimizer):
    """Adam on the server."""

    rate: float = 1e-3
    beta: float = 0.99
    tau: float = 1e-3

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
