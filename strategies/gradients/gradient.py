"""The contract of a gradient: how one is had."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from common.method import Method
from strategies.gradients.engine import Clipping, Engine, Unclipped


@dataclass(frozen=True, kw_only=True)
class Gradient(Method):
    """A way to the gradients of a step."""

    section = "gradient"
    private: ClassVar[bool]
    """Whether it can bound what a single example adds."""

    @abstractmethod
    def engine(self, network: nn.Module, bound: float, clipping: Clipping, sequences: bool) -> Engine:
        """The engine on ``network``, whose trainable parameters are set."""

    def attach(self, network: nn.Module, bound: float, clipping: Clipping = "flat", sequences: bool = False) -> Engine:
        """:meth:`engine`; none is needed where there is no bound."""
        if math.isinf(bound):
            return Unclipped(network, bound, clipping, sequences)
        return self.engine(network, bound, clipping, sequences)


@dataclass(frozen=True, kw_only=True)
class Backward(Gradient):
    """The ordinary backward pass, over the mean loss of a batch."""

    name = "backward"
    paper = "none"
    private = False

    def engine(self, network: nn.Module, bound: float, clipping: Clipping, sequences: bool) -> Engine:
        return Unclipped(network, math.inf, clipping, sequences)
