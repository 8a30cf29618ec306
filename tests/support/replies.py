"""Replies that a node should not send."""

import json
import zlib
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.adapter.values import Tensors, Update
from common.wire import message as wire
from common.wire.header import FORM, Header

GONE = RecordDict({"failure": ConfigRecord({"reason": "gone"})})


def bare(data: bytes) -> Array:
    """An array as a message has them."""
    return Array(dtype="uint8", shape=(len(data),), stype=FORM, data=data)


def packed(header: Header, tensors: Tensors, **changes: Any) -> ArrayRecord:
    """A message of these tensors in float32, whose header may say anything."""
    named = [(key.layer, key.part, list(tensor.shape)) for key, tensor in tensors.items()]
    said = header.model_dump() | {"codec": "fp32", "tensors": named} | changes
    values = b"".join(tensor.detach().to(torch.float32).contiguous().numpy().tobytes() for tensor in tensors.values())
    return ArrayRecord({"header": bare(zlib.compress(json.dumps(said).encode())), "values": bare(values)})


def replace_tensors(change):
    """A tamper that rewrites the tensors of an update."""

    def tamper(content: RecordDict) -> RecordDict:
        header, update = wire.unpack_update(content.array_records["update"], rule="fedit", round=0)
        tensors = change(dict(update.tensors))
        content["update"] = wire.pack_update(Update(tensors, update.weight, update.scale), "fedit", 0, header.node)
        return content

    return tamper
