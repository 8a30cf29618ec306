"""The form of a State or an Update inside a Flower message.

Flower's cost is per array, so a message is two arrays: ``header``, compressed JSON that names what follows, and
``values``, every tensor flattened one after the other in the header's codec. Where most values are zero a third one,
``mask``, holds a bit a value, and ``values`` only those that are not zero. A codec that loses something carries an
update as the difference from what the node received, which is small, and loses as much less.

Both directions are read with the same suspicion. An array is bare bytes, whose type is the codec's and whose size
follows from the header; the header's own size is bounded by the message's, and the receiver sees the shapes, and may
refuse them, before any value is read. So nothing is allocated on a claim.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.adapter.algebra import chosen_blocks, digest, leading
from common.adapter.values import OFFSET, Key, State, Tensors, Update, check_shapes
from common.error import BouquetError
from common.wire import codecs
from common.wire.header import FORM, MOST_TENSORS, SMALL_HEADER_BYTES, Header, check_header, raw, read_header

if TYPE_CHECKING:  # Flower takes seconds to import, and sizes are asked for without it
    from flwr.app import Array, ArrayRecord


def pack_state(
    state: State,
    rule: str,
    *,
    codec: str = "fp32",
    without: frozenset[str] = frozenset(),
) -> ArrayRecord:
    """A state as one record; ``without`` names the parts that the receiver has already, or draws for itself."""
    whole = state.adapter | state.offset
    held = {key: value for key, value in whole.items() if key.part in without}
    tensors = {key: value for key, value in whole.items() if key not in held}
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
    codec: str = "fp32",
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


def unpack_state(
    record: ArrayRecord, *, rule: str, most: int = MOST_TENSORS, fits: Callable[[State], None] | None = None
) -> tuple[Header, State]:
    """Read a state of ``rule``; what the node holds is still missing from it. Raises :class:`BouquetError`.

    ``most`` is how many tensors it can have; ``fits`` may refuse it by its shapes, before its values are read.
    """
    header = check_header(read_header(record, most), "state", rule)
    if fits is not None:
        fits(_state(header, header.blank()))
    return header, _state(header, _tensors(record, header))


def unpack_update(
    record: ArrayRecord,
    *,
    rule: str,
    round: int,
    received: Tensors | None = None,
    most: int = MOST_TENSORS,
    fits: Callable[[Update], None] | None = None,
) -> tuple[Header, Update]:
    """Read an update of ``rule`` made in ``round`` from ``received``. Raises :class:`BouquetError`.

    ``most`` is how many tensors it can have; ``fits`` may refuse it by its shapes, before its values are read.
    """
    header = check_header(read_header(record, most), "update", rule)
    if header.round != round:
        raise BouquetError(
            "an update of another round",
            where=f"node {header.node}",
            expected=f"round {round}",
            got=f"round {header.round}",
        )
    if fits is not None:
        fits(_update(header, header.blank()))
    tensors = _tensors(record, header)
    if header.relative:
        start = {key: _start(received or {}, key, tensor, header.slots) for key, tensor in tensors.items()}
        known = {key: tuple(tensor.shape) for key, tensor in start.items() if tensor.numel()}
        check_shapes(tensors, known, "an update is a difference from a state that was never sent")
        tensors = {key: tensor + start[key] for key, tensor in tensors.items()}
    return header, _update(header, tensors)


def most_bytes(state: State) -> int:
    """What an honest answer to ``state`` can hold at most: its values in float32, and a fifth of that for a header."""
    return 5 * sum(tensor.numel() for tensor in state.adapter.values()) + SMALL_HEADER_BYTES


def _start(received: Tensors, key: Key, tensor: Tensor, slots: Sequence[int]) -> Tensor:
    """What a node started from, cut to the slots that it sends; empty if that was nothing."""
    if key not in received:
        return torch.empty(0)
    rank = tensor.shape[0] if key.part == "A" else tensor.shape[-1]
    return chosen_blocks(key, leading(key, received[key], rank), slots)


def _names(tensors: Tensors) -> list[tuple[str, Any, list[int]]]:
    return [(key.layer, key.part, list(tensor.shape)) for key, tensor in tensors.items()]


def _state(header: Header, tensors: Tensors) -> State:
    adapter = {key: value for key, value in tensors.items() if key.part not in OFFSET}
    offset = {key: value for key, value in tensors.items() if key.part in OFFSET}
    return State(adapter, header.scale, header.round, offset, slots=tuple(header.slots))


def _update(header: Header, tensors: Tensors) -> Update:
    return Update(tensors, header.weight, header.scale, tuple(header.slots))


def _pack(header: Header, tensors: Tensors) -> ArrayRecord:
    from flwr.app import ArrayRecord

    flat = [tensor.detach().reshape(-1).float().cpu() for tensor in tensors.values()]
    values = torch.cat(flat) if flat else torch.empty(0)
    header = header.model_copy(update={"codec": codecs.able(values, header.codec)})
    arrays = {"header": _array(zlib.compress(header.model_dump_json(exclude_defaults=True).encode()))}
    # By the bits: a zero with a sign arrives as it is, or what both sides have a digest of would be two.
    mask = values.view(torch.int32) != 0
    if codecs.payload_size(len(values), int(mask.sum()), header.codec) < codecs.size_in_bytes(
        header.codec, len(values)
    ):
        arrays["mask"] = _array(np.packbits(mask.numpy()).tobytes())
        values = values[mask]
    arrays["values"] = _array(codecs.encode(values, header.codec).tobytes())
    return ArrayRecord(arrays)


def _tensors(record: ArrayRecord, header: Header) -> Tensors:
    sizes = [math.prod(shape) for _, _, shape in header.tensors]
    values = _read_values(record, header)
    chunks = torch.split(values, sizes) if sizes else ()
    return {
        Key(layer, part): chunk.reshape(shape)
        for (layer, part, shape), chunk in zip(header.tensors, chunks, strict=True)
    }


def _read_values(record: ArrayRecord, header: Header) -> Tensor:
    """All values of a message, flat; the zeros that a mask stands for included."""
    count = header.numel()
    if "mask" not in record:
        return codecs.decode(raw(record, "values"), header.codec, count)
    bits = raw(record, "mask")
    if len(bits) != math.ceil(count / 8):
        raise BouquetError(
            "a mask of the wrong size", expected=f"{math.ceil(count / 8):,} bytes", got=f"{len(bits):,} bytes"
        )
    mask = torch.from_numpy(np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count)).bool()
    sent = codecs.decode(raw(record, "values"), header.codec, int(mask.sum()))
    return torch.zeros(count).masked_scatter_(mask, sent)


def _array(data: bytes) -> Array:
    from flwr.app import Array

    return Array(dtype="uint8", shape=(len(data),), stype=FORM, data=data)
