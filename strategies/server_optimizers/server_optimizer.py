"""The contract of a server optimizer: the mean of the nodes is a direction, not always the destination.

Reddi et al., *Adaptive Federated Optimization*, arXiv:2003.00295, algorithm 2. With x the state and ``mean`` the nodes'
mean, the direction is D = mean - x.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

from common.adapter.values import State, Tensors
from common.method import Method


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(Method):
    """One step of the server from its state towards the mean of the nodes."""

    section = "server-optimizer"

    @abstractmethod
    def step(self, state: State, mean: Tensors) -> State:
        """The state after the step; tensors that ``mean`` lacks stay, and so does their memory."""


@dataclass(frozen=True, kw_only=True)
class ToTheMean(ServerOptimizer):
    """All the way, as federated averaging does."""

    name = "none"
    paper = "arXiv:1602.05629"

    def step(self, state: State, mean: Tensors) -> State:
        return replace(state, adapter={**state.adapter, **mean})
