"""Adapters as values: named low-rank tensors, and what a state and an update are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from common.adapter.limits import LARGEST
from common.error import BouquetError

FACTORS = frozenset({"A", "B"})
OFFSET = frozenset({"Q", "P"})
HEAD = frozenset({"W", "b"})

VARIANCE = "variance"
"""Of a server's memory, the name of what is a variance: it turns with a frame otherwise than a direction does."""


class Key(NamedTuple):
    """The name of one tensor: the adapted layer's path in the model, and the part."""

    layer: str
    part: str

    def __str__(self) -> str:
        return f"{self.layer}:{self.part}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The key that is written ``layer:part``. Raises :class:`BouquetError` where ``text`` is none."""
        layer, _, part = text.rpartition(":")
        if not (layer and part):
            raise BouquetError("a tensor without a layer or a part", expected="a name layer:part", got=text[:80])
        return cls(layer, part)


Tensors = dict[Key, Tensor]


class LayerShape(NamedTuple):
    """The size of one adapted linear layer."""

    d_out: int
    d_in: int


@dataclass(frozen=True)
class State:
    """The federation's model after ``round`` rounds: message, checkpoint and result in one value.

    ``adapter`` holds the factors (and the shared head), ``scale`` is s, ``offset`` holds Q and P of every layer that
    has one. The update to the base weight of a layer is ``s B A + Q P``, or ``s B R A + Q P`` with a core. ``memory``
    is what the server alone keeps, by name, and ``seed`` the run's, for what it draws; neither travels. ``slots`` says
    which of the federation's slots the factors of a node's view are, or which blocks of the core it trains; empty means
    the leading ones, or all blocks.
    """

    adapter: Tensors
    scale: float
    round: int = 0
    offset: Tensors = field(default_factory=dict)
    memory: Mapping[str, Tensors] = field(default_factory=dict)
    slots: tuple[int, ...] = ()
    seed: int = 0

    @property
    def rank(self) -> int:
        """The rank of the trained factors: the most slots that a layer has."""
        return max(self.ranks.values())

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """The slots of every layer."""
        return {key.layer: len(tensor) for key, tensor in self.adapter.items() if key.part == "A"}

    def layers(self) -> list[str]:
        """The adapted layers, in order."""
        return list(self.ranks)


@dataclass(frozen=True)
class Update:
    """What one node sends back: tensors, its weight in the mean (any positive unit), and the scale it trained with.

    ``slots`` are those of the view that it started from.
    """

    tensors: Tensors
    weight: float
    scale: float
    slots: tuple[int, ...] = ()

    @cached_property
    def rank(self) -> int:
        """The rank of the factors in it, as :attr:`State.rank`; 0 where there is none."""
        factors = ((key, tensor) for key, tensor in self.tensors.items() if key.part in FACTORS and tensor.ndim == 2)
        return max((tensor.shape[0 if key.part == "A" else 1] for key, tensor in factors), default=0)


def check_values(tensors: Mapping[Key, Tensor], what: str) -> None:
    """Raise :class:`BouquetError` unless every value is a number that training can have led to."""
    for key, tensor in tensors.items():
        if not tensor.numel():
            continue
        least, most = map(float, torch.aminmax(tensor))
        if not -LARGEST <= least <= most <= LARGEST:
            raise BouquetError(
                f"{what} out of range",
                where=str(key),
                expected=f"values within {LARGEST:g}",
                got=f"{least:.4g} to {most:.4g}",
            )


def check_range(state: State) -> None:
    """Raise :class:`BouquetError` unless every value of a state is one that training can have led to."""
    check_values({**state.adapter, **state.offset}, "a state")
    if not 0 < state.scale <= LARGEST or not 0 <= state.round <= LARGEST:
        raise BouquetError(
            "a state out of range",
            where="scale, round",
            expected=f"up to {LARGEST:g}",
            got=f"{state.scale}, {state.round}",
        )


def check_shapes(tensors: Tensors, expected: Mapping[Key, tuple[int, ...]], what: str) -> None:
    """Raise :class:`BouquetError` unless ``tensors`` has exactly the keys and shapes of ``expected``."""
    for kind, keys in (("missing", expected.keys() - tensors.keys()), ("unknown", tensors.keys() - expected.keys())):
        if keys:
            names = sorted(map(str, keys))
            raise BouquetError(
                f"{what}: {len(names)} {kind} tensors, such as {names[0]}",
                cure="Every machine must use the same model, lora.* and task.* settings.",
            )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise BouquetError(
                what, where=str(key), expected=f"shape {shape}", got=f"shape {tuple(tensors[key].shape)}"
            )
