"""The form of a State or an Update inside a Flower message.

Flower's cost is per array, so a message is two arrays: ``header``, compressed JSON that names what follows, and
``values``, every tensor flattened one after the other in the header's codec. Where most values are zero a third one,
``mask``, holds a bit a value, and ``values`` only those that are not zero. A codec that loses something carries an
update as the difference from what the node received, which is small, and loses as much less.

Both directions are read with the same suspicion: sizes are bounded before anything is allocated, and nothing is
unpickled.
"""

import io
import math
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from common import codec as codecs
from common.adapter import OFFSET, Key, State, Tensors, Update, check_shapes, chosen_blocks, digest, leading
from common.error import BouquetError

FORMAT = 1
MAX_HEADER_BYTES = 16 * 2**20

Size = Annotated[int, Field(ge=1, le=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Header(BaseModel):
    """What a message says of itself. ``held`` is the digest of the tensors that the receiver has without it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: int = FORMAT
    kind: Literal["state", "update"]
    rule: str
    round: Annotated[int, Field(ge=0)]
    codec: codecs.CodecName
    scale: Positive
    weight: Positive = 1.0
    node: str = ""
    held: str = ""
    rank: Annotated[int, Field(ge=0)] = 0
    relative: bool = False
    slots: list[Annotated[int, Field(ge=0)]] = []
    tensors: list[tuple[str, Literal["A", "B", "R", "s", "Q", "P", "W", "b"], list[Size]]]

    def numel(self) -> int:
        """How many values the message must hold."""
        return sum(math.prod(shape) for _, _, shape in self.tensors)


def pack_state(
    state: State,
    rule: str,
    *,
    codec: codecs.CodecName = "fp32",
    without: frozenset[str] = frozenset(),
) -> ArrayRecord:
    """A state as one record; ``without`` names the parts that the receiver has already, or draws for itself."""
    held = {key: value for key, value in state.adapter.items() if key.part in without}
    tensors = {key: value for key, value in state.adapter.items() if key not in held} | state.offset
    header = Header(
        kind="state",
        rule=rule,
        round=state.round,
        codec=codec,
        scale=state.scale,
        held=digest(held) if held else "",
        rank=state.rank,
        slots=list(state.slots),
        tensors=_names(tensors),
    )
    return _pack(header, tensors)


def pack_update(
    update: Update,
    rule: str,
    round: int,
    node: str,
    *,
    codec: codecs.CodecName = "fp32",
    received: Tensors | None = None,
) -> ArrayRecord:
    """An update of ``round`` (the round of the state it started from) as one record.

    ``received`` is what the node started from, for a codec that loses something; None if the update is a difference
    already.
    """
    relative = codec != "fp32" and received is not None
    tensors = update.tensors
    if relative and received is not None:
        tensors = {key: tensor - _start(received, key, tensor, update.slots) for key, tensor in tensors.items()}
    header = Header(
        kind="update",
        rule=rule,
        round=round,
        codec=codec,
        scale=update.scale,
        weight=update.weight,
        node=node,
        relative=relative,
        slots=list(update.slots),
        tensors=_names(tensors),
    )
    return _pack(header, tensors)


def unpack_state(record: ArrayRecord, *, rule: str) -> tuple[Header, State]:
    """Read a state of ``rule``; what the node holds is still missing from it. Raises :class:`BouquetError`."""
    header, tensors = _unpack(record, "state", rule)
    adapter = {key: value for key, value in tensors.items() if key.part not in OFFSET}
    offset = {key: value for key, value in tensors.items() if key.part in OFFSET}
    return header, State(adapter, header.scale, header.round, offset, slots=tuple(header.slots))


def unpack_update(
    record: ArrayRecord, *, rule: str, round: int, received: Tensors | None = None
) -> tuple[Header, Update]:
    """Read an update of ``rule`` made in ``round`` from ``received``. Raises :class:`BouquetError`."""
    header, tensors = _unpack(record, "update", rule)
    if header.round != round:
        raise BouquetError(
            "an update of another round",
            where=f"node {header.node}",
            expected=f"round {round}",
            got=f"round {header.round}",
        )
    if header.relative:
        start = {key: _start(received or {}, key, tensor, header.slots) for key, tensor in tensors.items()}
        known = {key: tuple(tensor.shape) for key, tensor in start.items() if tensor.numel()}
        check_shapes(tensors, known, "an update is a difference from what was never sent")
        tensors = {key: tensor + start[key] for key, tensor in tensors.items()}
    return header, Update(tensors, header.weight, header.scale, tuple(header.slots))


def most_bytes(state: State) -> int:
    """What an honest answer to ``state`` can hold at most, in float32 and with room for its header."""
    return 4 * sum(tensor.numel() for tensor in state.adapter.values()) + MAX_HEADER_BYTES


def read_header(record: ArrayRecord) -> Header:
    """What a record says of itself, and nothing of its values. Raises :class:`BouquetError`."""
    if set(record) - {"mask"} != {"header", "values"}:
        raise BouquetError(
            "a message of unknown form",
            expected="the arrays header and values, and perhaps mask",
            got=", ".join(sorted(record)) or "none",
        )
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(_array(record["header"]).tobytes(), MAX_HEADER_BYTES)
        if not inflate.eof:
            raise BouquetError(
                "a message header is too long or cut short", expected=f"at most {MAX_HEADER_BYTES:,} bytes"
            )
        return Header.model_validate_json(text)
    except (zlib.error, ValidationError) as error:
        raise BouquetError("a message header cannot be read", got=str(error).splitlines()[0]) from error


def payload_bytes(record: ArrayRecord) -> int:
    """The bytes of a record's arrays, as they travel."""
    return sum(len(array.data) for array in record.values())


def _start(received: Tensors, key: Key, tensor: Tensor, slots: Sequence[int]) -> Tensor:
    """What a node started from, cut to the slots that it sends; empty if that was nothing."""
    if key not in received:
        return torch.empty(0)
    rank = tensor.shape[0] if key.part == "A" else tensor.shape[-1]
    return chosen_blocks(key, leading(key, received[key], rank), slots)


def _names(tensors: Tensors) -> list[tuple[str, Any, list[int]]]:
    return [(key.layer, key.part, list(tensor.shape)) for key, tensor in tensors.items()]


def _pack(header: Header, tensors: Tensors) -> ArrayRecord:
    text = zlib.compress(header.model_dump_json(exclude_defaults=True).encode())
    arrays = {"header": Array(np.frombuffer(text, dtype=np.uint8))}
    flat = [tensor.detach().reshape(-1).float().cpu() for tensor in tensors.values()]
    values = torch.cat(flat) if flat else torch.empty(0)
    mask = values != 0
    whole, sparse = (codecs.size_in_bytes(header.codec, count) for count in (len(values), int(mask.sum())))
    if sparse + math.ceil(len(values) / 8) < whole:
        arrays["mask"] = Array(np.packbits(mask.numpy()))
        values = values[mask]
    arrays["values"] = Array(codecs.encode(values, header.codec))
    return ArrayRecord(arrays)


def _unpack(record: ArrayRecord, kind: str, rule: str) -> tuple[Header, Tensors]:
    header = read_header(record)
    for what, expected, got in (
        ("kind", kind, header.kind),
        ("rule", rule, header.rule),
        ("wire format", str(FORMAT), str(header.format)),
    ):
        if expected != got:
            raise BouquetError(
                f"a message of another {what}",
                where=f"node {header.node}" if header.node else "",
                expected=expected,
                got=got,
                cure="Every machine must run the same app with the same run config.",
            )
    values = _read_values(record, header)
    sizes = [math.prod(shape) for _, _, shape in header.tensors]
    chunks = torch.split(values, sizes) if sizes else ()
    tensors = {
        Key(layer, part): chunk.reshape(shape)
        for (layer, part, shape), chunk in zip(header.tensors, chunks, strict=True)
    }
    if len(tensors) != len(header.tensors):
        raise BouquetError("a message names one tensor twice", where=f"node {header.node}")
    return header, tensors


def _read_values(record: ArrayRecord, header: Header) -> Tensor:
    """All values of a message, flat; the zeros that a mask stands for included."""
    count = header.numel()
    if "mask" not in record:
        return codecs.decode(_array(record["values"]), header.codec, count)
    bits = _array(record["mask"])
    if bits.dtype != np.uint8 or bits.shape != (math.ceil(count / 8),):
        raise BouquetError(
            "a mask of the wrong size", expected=f"{math.ceil(count / 8):,} bytes", got=f"{bits.dtype} {bits.shape}"
        )
    mask = torch.from_numpy(np.unpackbits(bits, count=count)).bool()
    values = torch.zeros(count)
    values[mask] = codecs.decode(_array(record["values"]), header.codec, int(mask.sum()))
    return values


def _array(array: Array) -> NDArray[Any]:
    """The numpy array inside a Flower array, without ever unpickling."""
    if array.stype != "numpy.ndarray":
        raise BouquetError("an array of unknown form", expected="numpy.ndarray", got=array.stype)
    try:
        loaded: NDArray[Any] = np.load(io.BytesIO(array.data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BouquetError("an array cannot be read", got=str(error).splitlines()[0]) from error
    return loaded
