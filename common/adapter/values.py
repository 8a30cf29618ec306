"""Adapters as values: named low-rank tensors, and what a state and an update are made of.

Shapes, for one adapted linear layer with weight ``d_out x d_in``:

    A  r x d_in    B  d_out x r      the trained factors; the layer computes W x + s B A x
    R  r x q                         a core of r / q square blocks between them, where a rule has one: W x + s B R A x
    s  r / q                         what a node multiplies each block by while it trains
    Q  d_out x q   P  q x d_in       the frozen offset, scale 1; the layer adds Q P x
    W  d_out x d_in   b  d_out       a head layer, trained in full
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from common.adapter.limits import LARGEST
from common.error import BouquetError

FACTORS = frozenset({"A", "B"})
CORE = frozenset({"R", "s"})
OFFSET = frozenset({"Q", "P"})
HEAD = frozenset({"W", "b"})


class Key(NamedTuple):
    """The name of one tensor: the adapted layer's path in the model, and the part."""

    layer: str
    part: str

    def __str__(self) -> str:
        return f"{self.layer}:{self.part}"


Tensors = dict[Key, Tensor]


class LayerShape(NamedTuple):
    """The size of one adapted linear layer."""

    d_out: int
    d_in: int


@dataclass(frozen=True)
class Spec:
    """What an adapter of this model looks like; both sides derive it from the same config."""

    layers: Mapping[str, LayerShape]
    head: Mapping[Key, tuple[int, ...]]
    rank: int
    scale: float
    blocks: int = 0
    """Square blocks of the core between the factors; 0 where there is no core."""

    def factor_shapes(self) -> dict[Key, tuple[int, ...]]:
        """Shapes of A and B of every layer, and of its core if it has one, in the model's order."""
        shapes: dict[Key, tuple[int, ...]] = {}
        for layer, (d_out, d_in) in self.layers.items():
            shapes[Key(layer, "A")] = (self.rank, d_in)
            shapes[Key(layer, "B")] = (d_out, self.rank)
            if self.blocks:
                shapes[Key(layer, "R")] = (self.rank, self.rank // self.blocks)
                shapes[Key(layer, "s")] = (self.blocks,)
        return shapes

    @property
    def most_tensors(self) -> int:
        """How many tensors a state can have: the factors, the head, and an offset for every layer."""
        return len(self.factor_shapes()) + len(self.head) + len(OFFSET) * len(self.layers)


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
        """The rank of the trained factors."""
        return next(len(tensor) for key, tensor in self.adapter.items() if key.part == "A")

    def layers(self) -> list[str]:
        """The adapted layers, in order."""
        return [key.layer for key in self.adapter if key.part == "A"]


@dataclass(frozen=True)
class Update:
    """What one node sends back: tensors, its weight in the mean (any positive unit), and the scale it trained with.

    ``slots`` are those of the view that it started from.
    """

    tensors: Tensors
    weight: float
    scale: float
    slots: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """The rank of the factors in it; 0 where there is none."""
        return next(
            (
                tensor.shape[0 if key.part == "A" else 1]
                for key, tensor in self.tensors.items()
                if key.part in FACTORS and tensor.ndim == 2
            ),
            0,
        )


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


def check_form(state: State, spec: Spec) -> None:
    """Raise :class:`BouquetError` unless a received state is of ``spec``'s model by names and shapes.

    Parts may be missing, slots may be fewer, and values need not have been read.
    """
    largest = spec.factor_shapes() | dict(spec.head)
    for key, tensor in {**state.adapter, **state.offset}.items():
        shape = tuple(tensor.shape)
        if key.part in OFFSET:
            fits = key.layer in spec.layers and _offset_fits(state.offset, spec, key.layer)
        else:
            fits = key in largest and shape in (largest[key], _narrow(key, largest[key], shape))
        if not fits:
            raise BouquetError(
                "a state that does not fit this machine's model",
                where=str(key)[:200],
                expected=f"shape {largest[key]}, or fewer slots" if key in largest else "a layer of the model",
                got=f"shape {shape}",
                cure="Every machine must use the same model, lora.* and task.* settings.",
            )


def _narrow(key: Key, whole: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a factor of as few slots as ``shape`` has."""
    if key.part not in FACTORS or len(shape) != 2:
        return whole
    slots = min(shape[0 if key.part == "A" else 1], whole[0 if key.part == "A" else 1])
    return (slots, whole[1]) if key.part == "A" else (whole[0], slots)


def _offset_fits(offset: Tensors, spec: Spec, layer: str) -> bool:
    """Whether Q and P of a layer are both there, and of no more columns than such a layer can need."""
    q, p, (d_out, d_in) = offset.get(Key(layer, "Q")), offset.get(Key(layer, "P")), spec.layers[layer]
    if q is None or p is None or q.ndim != 2:
        return False
    columns = q.shape[1]
    # What a view leaves to the node of other slots stands beside the offset.
    return q.shape == (d_out, columns) and p.shape == (columns, d_in) and columns <= min(d_out, d_in) + spec.rank


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
