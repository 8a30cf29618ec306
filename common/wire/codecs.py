"""How float32 tensors become the flat arrays of a message.

codec   bytes of n values        error of one value
fp32    4 n                      none
fp16    2 n                      2^-11 of it (normal range)
bf16    2 n                      2^-8 of it
int8    n + 4 ceil(n / 256)      1/254 of the largest magnitude in its block of 256
nf4     ceil(n/2) + 4 ceil(n/64) 0.152 of the largest magnitude in its block of 64
"""

import math

import numpy as np
from torch import Tensor

from common.error import BouquetError
from common.method import Registry
from common.wire.blockwise import Int8, NormalFloat4
from common.wire.codec import Array, Codec
from common.wire.floats import BFloat16, Float16, Float32

CODECS = Registry[Codec](
    "wire",
    Float32,
    Float16,
    BFloat16,
    Int8,
    NormalFloat4,
    default="fp32",
    chooses="How the values of a message are encoded.",
)


def size_in_bytes(codec: str, count: int) -> int:
    """The bytes that ``count`` values become."""
    return CODECS[codec]().size(count) * np.dtype(CODECS[codec].dtype).itemsize


def payload_size(count: int, nonzero: int, codec: str) -> int:
    """The bytes of a message's ``count`` values, of which so many are not zero; its header comes on top."""
    sparse = size_in_bytes(codec, nonzero) + math.ceil(count / 8)
    return min(sparse, size_in_bytes(codec, count))


def able(values: Tensor, codec: str) -> str:
    """``codec``; or, where a value lies beyond its range, one of the same size that holds it."""
    return codec if CODECS[codec]().holds(values) else "bf16"


def encode(values: Tensor, codec: str) -> Array:
    """Encode one flat float32 tensor."""
    return CODECS[codec]().encode(values.detach().cpu().contiguous())


def decode(data: bytes, codec: str, count: int) -> Tensor:
    """Decode ``count`` values into a flat float32 tensor of its own memory. Raises :class:`BouquetError` on others."""
    if len(data) != size_in_bytes(codec, count):
        raise BouquetError(
            "a message of the wrong size",
            where=f"codec {codec}",
            expected=f"{size_in_bytes(codec, count):,} bytes for {count:,} values",
            got=f"{len(data):,}",
        )
    return CODECS[codec]().decode(np.frombuffer(data, dtype=CODECS[codec].dtype).copy(), count)
