"""What an adapter of one model looks like, and whether a received state is of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.adapter.lora import Lora
from common.adapter.structure import Structure
from common.adapter.values import FACTORS, OFFSET, Key, LayerShape, State, Tensors
from common.error import BouquetError


@dataclass(frozen=True)
class Spec:
    """An adapter's layers and head, its rank and scale; both sides derive it from the same config."""

    layers: Mapping[str, LayerShape]
    head: Mapping[Key, tuple[int, ...]]
    rank: int
    scale: float
    structure: Structure = field(default_factory=Lora)
    ranks: Mapping[str, int] = field(default_factory=dict)
    """The most slots of layers that may have fewer than the others."""

    def rank_of(self, layer: str) -> int:
        """The slots of a layer."""
        return min(self.rank, self.ranks.get(layer, self.rank))

    def factor_shapes(self) -> dict[Key, tuple[int, ...]]:
        """Shapes of what all layers have in common, and of every tensor of every layer, in the model's order."""
        common = {key: tuple(tensor.shape) for key, tensor in self.structure.common().items()}
        return common | {
            Key(layer, part): size
            for layer, shape in self.layers.items()
            for part, size in self.structure.layer(shape, self.rank_of(layer))
        }

    @property
    def most_tensors(self) -> int:
        """How many tensors a state can have: the factors, the head, and an offset for every layer."""
        return len(self.factor_shapes()) + len(self.head) + len(OFFSET) * len(self.layers)


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
