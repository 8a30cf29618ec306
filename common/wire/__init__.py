"""How a State or an Update travels: the message, its header, and the codecs of its values."""

from common.wire.header import Header, payload_bytes, read_header
from common.wire.message import most_bytes, pack_state, pack_update, unpack_state, unpack_update

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
