"""Replies that a node should not send."""

from flwr.app import Array, ConfigRecord, RecordDict

from common import wire
from common.adapter import Update

GONE = RecordDict({"failure": ConfigRecord({"reason": "gone"})})


def bare(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=wire.FORM, data=data)


def replace_tensors(change):
    """A tamper that rewrites the tensors of an update."""

    def tamper(content: RecordDict) -> RecordDict:
        header, update = wire.unpack_update(content.array_records["update"], rule="fedit", round=0)
        tensors = change(dict(update.tensors))
        content["update"] = wire.pack_update(Update(tensors, update.weight, update.scale), "fedit", 0, header.node)
        return content

    return tamper
