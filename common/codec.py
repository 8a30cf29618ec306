"""How float32 tensors become the flat arrays of a message.

A codec turns one flat float32 tensor into one numpy array and back. Flower's arrays know numpy's types only, so
bfloat16 travels as its 16 bits. Error of one value, relative: fp32 none, fp16 2^-11 (normal range), bf16 2^-8.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.error import BouquetError

Array = NDArray[Any]
CodecName = Literal["fp32", "fp16", "bf16"]


class Codec(NamedTuple):
    """One wire format: ``bytes_per_value``, the numpy type that travels, and both directions."""

    dtype: str
    bytes_per_value: int
    encode: Callable[[Tensor], Array]
    decode: Callable[[Array], Tensor]


def _to_fp16(values: Tensor) -> Array:
    limit = torch.finfo(torch.float16).max
    if values.numel() and (largest := values.abs().max().item()) > limit:
        raise BouquetError(
            "a value does not fit the wire format",
            where="wire.codec = 'fp16'",
            expected=f"at most {limit:g}",
            got=f"{largest:g}",
            cure="Use wire.codec = 'bf16' or 'fp32'.",
        )
    return values.to(torch.float16).numpy()


CODECS: Mapping[CodecName, Codec] = {
    "fp32": Codec("float32", 4, lambda values: values.numpy(), torch.from_numpy),
    "fp16": Codec("float16", 2, _to_fp16, lambda array: torch.from_numpy(array).float()),
    "bf16": Codec(
        "uint16",
        2,
        lambda values: values.to(torch.bfloat16).view(torch.uint16).numpy(),
        lambda array: torch.from_numpy(array).view(torch.bfloat16).float(),
    ),
}


def encode(values: Tensor, codec: CodecName) -> Array:
    """Encode one flat float32 tensor. Raises :class:`BouquetError` where a value has no such form."""
    return CODECS[codec].encode(values.detach().cpu().contiguous())


def decode(array: Array, codec: CodecName) -> Tensor:
    """Decode into a flat float32 tensor of its own memory. Raises :class:`BouquetError` on a foreign array."""
    expected = np.dtype(CODECS[codec].dtype)
    if array.dtype != expected or array.ndim != 1:
        raise BouquetError(
            "the message does not hold what its codec says",
            where=f"codec {codec}",
            expected=f"one flat array of {expected}",
            got=f"{array.ndim} dimensions of {array.dtype}",
        )
    return CODECS[codec].decode(array.copy())
