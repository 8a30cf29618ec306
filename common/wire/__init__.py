"""How a State or an Update travels: the message, and the codecs of its values."""

from common.wire.message import (
    Header,
    most_bytes,
    pack_state,
    pack_update,
    payload_bytes,
    read_header,
    unpack_state,
    unpack_update,
)

__all__ = [
    "Header",
    "most_bytes",
    "pack_state",
    "pack_update",
    "payload_bytes",
    "read_header",
    "unpack_state",
    "unpack_update",
]
