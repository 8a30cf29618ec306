"""Adapters as values: named low-rank tensors, and the algebra over them.

Shapes, for one adapted linear layer with weight ``d_out x d_in``:

    A  r x d_in    B  d_out x r      the trained factors; the layer computes W x + s B A x
    R  r x q                         a core of r / q square blocks between them, where a rule has one: W x + s B R A x
    s  r / q                         what a node multiplies each block by while it trains
    Q  d_out x q   P  q x d_in       the frozen offset, scale 1; the layer adds Q P x
    W  d_out x d_in   b  d_out       a head layer, trained in full

Nothing here forms a ``d_out x d_in`` product.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from common.error import BouquetError
from common.limits import LARGEST
from common.threads import each

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


def leading(key: Key, tensor: Tensor, rank: int) -> Tensor:
    """The leading ``rank`` slots of a factor; a head as it is."""
    if key.part == "A":
        return tensor[:rank]
    return tensor[:, :rank] if key.part == "B" else tensor


def chosen_blocks(key: Key, tensor: Tensor, blocks: Sequence[int]) -> Tensor:
    """Some blocks of a core, one above the other; all of them if none is named. Any other tensor as it is."""
    if key.part != "R" or not blocks:
        return tensor
    return tensor.reshape(-1, tensor.shape[1], tensor.shape[1])[list(blocks)].flatten(0, 1)


def weighted_mean(updates: Iterable[tuple[float, Tensors]]) -> Tensors:
    """The weighted mean of each tensor over the updates that have it, as a running mean.

    Needs the memory of one update however many come. A single update, and equal updates, come back to the bit.
    """
    mean: Tensors = {}
    total: dict[Key, float] = {}
    for weight, tensors in updates:
        for key, tensor in tensors.items():
            total[key] = total.get(key, 0.0) + weight
            if key in mean:
                mean[key] = moved(mean[key], tensor, weight / total[key])
            else:
                mean[key] = tensor.clone()
    return mean


def towards(start: Tensor, end: Tensor, share: float | Tensor) -> Tensor:
    """``start + share (end - start)``; just ``end`` at a share of 1.

    ``torch.lerp``, in additions and multiplications that every CPU rounds alike.
    """
    step, rest = end - start, 1 - share
    if isinstance(share, float):
        return start + step * share if share < 0.5 else end - step * rest
    return torch.where(share < 0.5, start + step * share, end - step * rest)


def moved(start: Tensor, end: Tensor, share: float) -> Tensor:
    """:func:`towards`, to the bit, in the memory of ``start`` where it can be."""
    return start.add_(end.sub(start).mul_(share)) if share < 0.5 else towards(start, end, share)


def squared_norm(left: Tensor, right: Tensor) -> Tensor:
    """The squared Frobenius norm of ``left @ right``, in float64: ``sum((L^T L) * (R R^T))``."""
    left, right = left.double(), right.double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0)


def low_rank_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact thin SVD ``U, S, Vh`` of ``left @ right`` (``d_out x q``, ``q x d_in``), from two QRs and a core."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, singular, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, singular, vh @ q_right.T


def balanced(u: Tensor, singular: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading directions of an SVD as two factors of the same size."""
    root = singular[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def directions_holding(energy: float, singular: Tensor) -> int:
    """The fewest leading singular values whose squares hold a share ``energy`` of all squares; at least 1."""
    share = singular.square().cumsum(0) / singular.square().sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return min(int((share < energy).sum()) + 1, len(singular))


def numerical_rank(singular: Tensor, shape: LayerShape) -> int:
    """How many singular values of a float64 decomposition are more than its rounding."""
    return int((singular > singular[0] * max(shape) * torch.finfo(torch.float64).eps).sum())


def recompress(left: Tensor, right: Tensor, energy: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same product ``left @ right`` in as few columns as its numerical rank; in fewer if ``energy`` allows."""
    u, singular, vh = low_rank_svd(left.double(), right.double())
    rank = max(1, numerical_rank(singular, LayerShape(left.shape[0], right.shape[1])))
    if energy < 1:
        rank = min(rank, directions_holding(energy, singular))
    left_factor, right_factor = balanced(u, singular, vh, rank)
    return left_factor.to(left.dtype), right_factor.to(right.dtype)


def break_even_rank(d_out: int, d_in: int) -> int:
    """The rank above which two factors hold more values than their ``d_out x d_in`` product."""
    return d_out * d_in // (d_out + d_in)


def multiplied(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product ``left @ right`` as one dense factor, and an identity on the smaller side.

    An identity is nearly free to send, as zeros do not travel, so that this costs what the product does. Factors that
    begin with such a pair, as those that are extended again do, have it added and not multiplied.
    """
    (d_out, _), (_, d_in) = left.shape, right.shape
    small = min(d_out, d_in)
    dense = torch.zeros(d_out, d_in, dtype=torch.float64)
    if left.shape[1] >= small and torch.equal((left[:, :small] if d_out < d_in else right[:small]), torch.eye(small)):
        dense += right[:small] if d_out < d_in else left[:, :small]
        left, right = left[:, small:], right[small:]
    dense = (dense + left.double() @ right.double()).float()
    return (torch.eye(small), dense) if d_out < d_in else (dense, torch.eye(small))


def extend_offset(offset: Tensors, extra: Tensors, energy: float = 1.0) -> Tensors:
    """Add two offsets: factors side by side, or past the break-even rank their product.

    With ``energy`` below 1 the factors are recompressed there instead, to that share of the squared singular values;
    what is past the break-even rank even so is multiplied out.
    """

    def extended(layer: str) -> tuple[Tensor, Tensor]:
        q, p = Key(layer, "Q"), Key(layer, "P")
        left, right = extra[q], extra[p]
        if q in offset:
            left, right = torch.cat([offset[q], left], dim=1), torch.cat([offset[p], right], dim=0)
        most = break_even_rank(left.shape[0], right.shape[1])
        if left.shape[1] > most and energy < 1:
            left, right = recompress(left, right, energy)
        if left.shape[1] > most:
            left, right = multiplied(left, right)
        return left, right

    layers = list(dict.fromkeys(key.layer for key in extra))
    total = dict(offset)
    for layer, (left, right) in zip(layers, each(layers, extended), strict=True):
        total[Key(layer, "Q")], total[Key(layer, "P")] = left, right
    return total


def cored(adapter: Tensors, layer: str) -> Tensor:
    """A of one layer, multiplied by its core where it has one: ``r x d_in``."""
    a = adapter[Key(layer, "A")]
    core = adapter.get(Key(layer, "R"))
    if core is None:
        return a
    size = core.shape[1]
    return (core.reshape(-1, size, size) @ a.reshape(-1, size, a.shape[1])).reshape(a.shape)


def stacked(state: State) -> Tensors:
    """Factors A and B of scale 1 with the whole update of every layer: adapter, core and offset in one."""
    factors: Tensors = {}
    for layer in state.layers():
        right, left = cored(state.adapter, layer), state.scale * state.adapter[Key(layer, "B")]
        if Key(layer, "Q") in state.offset:
            right = torch.cat([right, state.offset[Key(layer, "P")]], dim=0)
            left = torch.cat([left, state.offset[Key(layer, "Q")]], dim=1)
        factors[Key(layer, "A")], factors[Key(layer, "B")] = right, left
    return factors


def digest(tensors: Mapping[Key, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        sha.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


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
