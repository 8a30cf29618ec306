"""The contract of a gradient: how the gradients of a step are found."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from common.adapter.structure import Structure
from common.method import Method
from strategies.gradients.engine import Clipping, Engine, Unclipped


@dataclass(frozen=True, kw_only=True)
class Gradient(Method):
    """A way to the gradients of a step: of a batch as a whole, or of every example by itself, clipped."""

    section = "gradient"
    engine: ClassVar[type[Engine] | None] = None
    """What bounds the part of a single example in a private run; None where only whole batches have a gradient."""
    packs: ClassVar[bool] = True
    """Whether the layers may see a batch without its padding."""
    rests: ClassVar[bool] = True
    """Whether part of what is trained may rest in a step."""
    training: ClassVar[bool] = True
    """Whether the network is in training mode, with its dropout."""
    heads: ClassVar[bool] = True
    """Whether it finds the gradient of a head, beside that of the adapter."""

    @classmethod
    def knows(cls, structure: Structure) -> bool:
        """Whether it finds the gradient of what a structure trains: for most, where a backward pass does."""
        return structure.gradient == Structure.gradient

    def fill(self, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        """Add the gradient of ``loss`` by ``parameters`` to what they have; its value."""
        raise NotImplementedError(f"{self.name} finds gradients of single examples alone")

    def attach(self, network: nn.Module, bound: float, clipping: Clipping = "flat", sequences: bool = False) -> Engine:
        """The engine on ``network``, whose trainable parameters are set; none of its own is needed for no bound."""
        engine = Unclipped if math.isinf(bound) else self.engine
        if engine is None:
            raise NotImplementedError(f"{self.name} does not bound what a single example adds")
        return engine(network, bound, clipping, sequences)


@dataclass(frozen=True, kw_only=True)
class Backward(Gradient):
    """The ordinary backward pass, over the mean loss of a batch."""

    name = "backward"
    paper = "none"

    def fill(self, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value
