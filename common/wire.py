"""The form of a State or an Update inside a Flower message.

Flower's cost is per array, so a message is two arrays: ``header``, compressed JSON that names what follows, and
``values``, every tensor flattened one after the other in the header's codec. Both directions are read with the same
suspicion: sizes are bounded before anything is allocated, and nothing is unpickled.
"""

import io
import math
import zlib
from typing import Annotated, Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import codec as codecs
from common.adapter import OFFSET, Key, State, Tensors, Update
from common.error import BouquetError

FORMAT = 1
MAX_HEADER_BYTES = 16 * 2**20

Size = Annotated[int, Field(ge=1, le=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Header(BaseModel):
    """What a message says of itself. ``seeded`` is the digest of the tensors that both sides draw for themselves."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: int = FORMAT
    kind: Literal["state", "update"]
    rule: str
    round: Annotated[int, Field(ge=0)]
    codec: codecs.CodecName
    scale: Positive
    weight: Positive = 1.0
    node: str = ""
    seeded: str = ""
    tensors: list[tuple[str, Literal["A", "B", "R", "Q", "P", "W", "b"], list[Size]]]

    def numel(self) -> int:
        """How many values the message must hold."""
        return sum(math.prod(shape) for _, _, shape in self.tensors)


def pack_state(
    state: State,
    rule: str,
    *,
    codec: codecs.CodecName = "fp32",
    without: frozenset[str] = frozenset(),
    seeded: str = "",
) -> ArrayRecord:
    """A state as one record; ``without`` names the parts that the receiver draws for itself."""
    tensors = {key: value for key, value in state.adapter.items() if key.part not in without} | state.offset
    header = Header(
        kind="state",
        rule=rule,
        round=state.round,
        codec=codec,
        scale=state.scale,
        seeded=seeded,
        tensors=_names(tensors),
    )
    return _pack(header, tensors)


def pack_update(update: Update, rule: str, round: int, node: str, *, codec: codecs.CodecName = "fp32") -> ArrayRecord:
    """An update of ``round`` (the round of the state it started from) as one record."""
    header = Header(
        kind="update",
        rule=rule,
        round=round,
        codec=codec,
        scale=update.scale,
        weight=update.weight,
        node=node,
        tensors=_names(update.tensors),
    )
    return _pack(header, update.tensors)


def unpack_state(record: ArrayRecord, *, rule: str) -> tuple[Header, State]:
    """Read a state of ``rule``; seeded parts are still missing from it. Raises :class:`BouquetError`."""
    header, tensors = _unpack(record, "state", rule)
    adapter = {key: value for key, value in tensors.items() if key.part not in OFFSET}
    offset = {key: value for key, value in tensors.items() if key.part in OFFSET}
    return header, State(adapter, header.scale, header.round, offset)


def unpack_update(record: ArrayRecord, *, rule: str, round: int) -> tuple[Header, Update]:
    """Read an update of ``rule`` made in ``round``. Raises :class:`BouquetError`."""
    header, tensors = _unpack(record, "update", rule)
    if header.round != round:
        raise BouquetError(
            "an update of another round",
            where=f"node {header.node}",
            expected=f"round {round}",
            got=f"round {header.round}",
        )
    return header, Update(tensors, header.weight, header.scale)


def most_bytes(state: State) -> int:
    """What an honest answer to ``state`` can hold at most, in float32 and with room for its header."""
    return 4 * sum(tensor.numel() for tensor in state.adapter.values()) + MAX_HEADER_BYTES


def payload_bytes(record: ArrayRecord) -> int:
    """The bytes of a record's arrays, as they travel."""
    return sum(len(array.data) for array in record.values())


def _names(tensors: Tensors) -> list[tuple[str, Any, list[int]]]:
    return [(key.layer, key.part, list(tensor.shape)) for key, tensor in tensors.items()]


def _pack(header: Header, tensors: Tensors) -> ArrayRecord:
    text = zlib.compress(header.model_dump_json(exclude_defaults=True).encode())
    values = codecs.encode(torch.cat([tensor.reshape(-1).float() for tensor in tensors.values()]), header.codec)
    return ArrayRecord({"header": Array(np.frombuffer(text, dtype=np.uint8)), "values": Array(values)})


def _unpack(record: ArrayRecord, kind: str, rule: str) -> tuple[Header, Tensors]:
    if set(record) != {"header", "values"}:
        raise BouquetError(
            "a message of unknown form",
            expected="the arrays header and values",
            got=", ".join(sorted(record)) or "none",
        )
    header = _read_header(record["header"])
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
    values = codecs.decode(_array(record["values"]), header.codec)
    if len(values) != header.numel():
        raise BouquetError(
            "a message of the wrong size", expected=f"{header.numel():,} values", got=f"{len(values):,} values"
        )
    chunks = torch.split(values, [math.prod(shape) for _, _, shape in header.tensors])
    tensors = {
        Key(layer, part): chunk.reshape(shape)
        for (layer, part, shape), chunk in zip(header.tensors, chunks, strict=True)
    }
    if len(tensors) != len(header.tensors):
        raise BouquetError("a message names one tensor twice", where=f"node {header.node}")
    return header, tensors


def _read_header(array: Array) -> Header:
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(_array(array).tobytes(), MAX_HEADER_BYTES)
        if not inflate.eof:
            raise BouquetError(
                "a message header is too long or cut short", expected=f"at most {MAX_HEADER_BYTES:,} bytes"
            )
        return Header.model_validate_json(text)
    except (zlib.error, ValidationError) as error:
        raise BouquetError("a message header cannot be read", got=str(error).splitlines()[0]) from error


def _array(array: Array) -> NDArray[Any]:
    """The numpy array inside a Flower array, without ever unpickling."""
    if array.stype != "numpy.ndarray":
        raise BouquetError("an array of unknown form", expected="numpy.ndarray", got=array.stype)
    try:
        loaded: NDArray[Any] = np.load(io.BytesIO(array.data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BouquetError("an array cannot be read", got=str(error).splitlines()[0]) from error
    return loaded
