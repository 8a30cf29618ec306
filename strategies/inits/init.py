"""The contract of an init: where the adapter starts, and what has to be looked at for that."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from common.adapter.values import LayerShape
from common.method import Method, option


class Start(NamedTuple):
    """Where one layer starts: B (``d_out x r``), A (``r x d_in``), and what an init puts between them, if anything."""

    b: Tensor
    a: Tensor
    core: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Init(Method):
    """A start. One that needs only shapes is drawn by every side from the run's seed, and never travels.

    What has to see more is worked out by the coordinator, from data that it names itself, and sent once.
    """

    section = "init"
    orthonormal: ClassVar[bool] = False
    """Whether both factors have orthonormal slots, so that the scale is 1 and there is no alpha to tune."""
    moves: ClassVar[bool] = False
    """Whether the start is a step away from the base model, and meant to be; any other is taken off again."""

    @abstractmethod
    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        """The start of one layer.

        ``seen`` is what the init needs to see of it: the gradient of the mean loss by its frozen weight
        (``d_out x d_in``); None where it needs the shape alone.
        """


@dataclass(frozen=True, kw_only=True)
class GradientInit(Init):
    """A start that sees the gradient of the mean loss on the first ``examples`` of a public file, ``source``."""

    source: str = option("", needed="a file of public examples")
    """The coordinator's file of public examples whose gradient the start is made of."""
    examples: int = option(64, ge=1)
    """How many examples from its beginning are looked at."""
