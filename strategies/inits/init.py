"""The contract of an init: where the adapter starts, and what has to be looked at for that."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

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

    What has to see more is worked out by the coordinator, from its own base model and public data that the run names,
    and sent once.
    """

    section = "init"
    sees: ClassVar[Literal["nothing", "weights", "inputs", "gradients"]] = "nothing"
    """What it has to see of a layer: its frozen weight, what goes into it, or the gradient by its weight."""
    orthonormal: ClassVar[bool] = False
    """Whether both factors have orthonormal slots."""
    unit: ClassVar[bool] = False
    """Whether the factors are meant as they are, so that the scale is 1 and there is no alpha to tune."""
    zero: ClassVar[bool] = False
    """Whether B starts at zero, so that nothing has to be taken off."""
    moves: ClassVar[bool] = False
    """Whether the start is a step away from the base model, and meant to be; any other is taken off again."""

    def ranks(self, singular: Mapping[str, Tensor], rank: int) -> Mapping[str, int]:
        """The layers that keep fewer slots of the start than ``rank``, the leading ones, and how many.

        ``singular`` are the singular values of what it has seen of each layer, if :attr:`shares_out` says so.
        """
        return {}

    @property
    def shares_out(self) -> bool:
        """Whether layers come to have different ranks by what it sees of them."""
        return False

    @classmethod
    def taken_off(cls) -> bool:
        """Whether what the start adds to the base model is taken off again, by the offset."""
        return not (cls.zero or cls.moves)

    @abstractmethod
    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        """The start of one layer.

        ``seen`` is what the init :attr:`sees` of it: the weight (``d_out x d_in``), the main directions of what goes
        in, scaled (``k x d_in``), or the gradient of the mean loss by the weight (``d_out x d_in``). It is None for an
        init that sees nothing, and on a node, which gets the start and has to know its shapes alone.
        """


@dataclass(frozen=True, kw_only=True)
class WeightInit(Init):
    """A start that is taken from the frozen weight; slots that a small layer has no room for are zero."""

    sees = "weights"
    unit = True

    @abstractmethod
    def split(self, weight: Tensor, kept: int) -> Start:
        """``kept`` slots of the start, of a weight in float64: B ``d_out x kept``, A ``kept x d_in``, and a core."""

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        if seen is None:
            return Start(torch.zeros(shape.d_out, rank), torch.zeros(rank, shape.d_in))
        missing = rank - (kept := min(rank, *shape))
        b, a, core = self.split(seen.double(), kept)
        return Start(
            pad(b.float().contiguous(), (0, missing)),
            pad(a.float().contiguous(), (0, 0, 0, missing)),
            None if core is None else pad(core.float(), (0, missing, 0, missing)),
        )


@dataclass(frozen=True, kw_only=True)
class PublicInit(Init):
    """A start that sees what the first ``examples`` of a public file, ``source``, do in the base model."""

    source: str = option("", needed="a file of public examples")
    """The coordinator's file of public examples that the start is made of."""
    examples: int = option(64, ge=1)
    """How many examples from its beginning are looked at."""
