"""How float32 tensors become the flat arrays of a message.

A codec turns one flat float32 tensor into one numpy array and back. Flower's arrays know numpy's types only, so
bfloat16 travels as its 16 bits, and the blockwise codecs as bytes: the codes, then a float32 scale a block.

    codec   bytes of n values        error of one value
    fp32    4 n                      none
    fp16    2 n                      2^-11 of it (normal range)
    bf16    2 n                      2^-8 of it
    int8    n + 4 ceil(n / 256)      1/254 of the largest magnitude in its block of 256
    nf4     ceil(n/2) + 4 ceil(n/64) 0.152 of the largest magnitude in its block of 64
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.error import BouquetError
from common.method import Method, Registry

Array = NDArray[Any]

# The 16 values of NormalFloat4, quantiles of the normal distribution: Dettmers et al., QLoRA, arXiv:2305.14314, app. E.
NF4 = torch.tensor(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)


class Codec(Method):
    """One wire format: ``dtype`` is numpy's type for it; the error of a ``coarse`` one is worth feeding back."""

    section = "wire"
    paper = "none"

    dtype: ClassVar[str]
    coarse: ClassVar[bool] = False

    @abstractmethod
    def size(self, count: int) -> int:
        """The length of the array that ``count`` values become."""

    def holds(self, values: Tensor) -> bool:
        """Whether all of ``values`` lie in its range."""
        return True

    @abstractmethod
    def encode(self, values: Tensor) -> Array:
        """Encode one flat, contiguous float32 tensor on the CPU."""

    @abstractmethod
    def decode(self, array: Array, count: int) -> Tensor:
        """Decode ``count`` values from an array of the right type and length."""


class Float32(Codec):
    """The values themselves."""

    name = "fp32"
    dtype = "float32"

    def size(self, count: int) -> int:
        return count

    def encode(self, values: Tensor) -> Array:
        array: Array = values.numpy()
        return array

    def decode(self, array: Array, count: int) -> Tensor:
        return torch.from_numpy(array)


class Float16(Float32):
    """IEEE half precision; holds nothing beyond its range."""

    name = "fp16"
    dtype = "float16"

    def holds(self, values: Tensor) -> bool:
        return not bool((values.abs() > torch.finfo(torch.float16).max).any())

    def encode(self, values: Tensor) -> Array:
        array: Array = values.to(torch.float16).numpy()
        return array

    def decode(self, array: Array, count: int) -> Tensor:
        return torch.from_numpy(array).float()


class BFloat16(Float32):
    """The upper half of a float32, as an unsigned integer."""

    name = "bf16"
    dtype = "uint16"

    def encode(self, values: Tensor) -> Array:
        array: Array = values.to(torch.bfloat16).view(torch.uint16).numpy()
        return array

    def decode(self, array: Array, count: int) -> Tensor:
        return torch.from_numpy(array).view(torch.bfloat16).float()


class Blockwise(Codec):
    """Codes of a few bits and one float32 scale a block, the block's largest magnitude."""

    dtype = "uint8"
    coarse = True
    block: ClassVar[int]

    @abstractmethod
    def codes(self, scaled: Tensor) -> Tensor:
        """One byte a code array from values in [-1, 1]; whatever packing there is included."""

    @abstractmethod
    def scaled(self, codes: Tensor, count: int) -> Tensor:
        """The values in [-1, 1] that ``count`` codes stand for."""

    @abstractmethod
    def code_bytes(self, count: int) -> int:
        """The bytes of ``count`` codes."""

    def size(self, count: int) -> int:
        return self.code_bytes(count) + 4 * math.ceil(count / self.block)

    def encode(self, values: Tensor) -> Array:
        blocks = self._blocks(values)
        scales = blocks.abs().amax(dim=1)
        scaled = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0.0)
        codes: Array = self.codes(scaled.reshape(-1)[: len(values)]).numpy()
        return np.concatenate([codes, scales.numpy().view(np.uint8)])

    def decode(self, array: Array, count: int) -> Tensor:
        codes, scales = np.split(array, [self.code_bytes(count)])
        values = self._blocks(self.scaled(torch.from_numpy(codes), count))
        return (values * torch.from_numpy(scales.view(np.float32))[:, None]).reshape(-1)[:count]

    def _blocks(self, values: Tensor) -> Tensor:
        missing = -len(values) % self.block
        return torch.nn.functional.pad(values, (0, missing)).reshape(-1, self.block)


class Int8(Blockwise):
    """Eight bits a value, evenly spaced."""

    name = "int8"
    block = 256

    def code_bytes(self, count: int) -> int:
        return count

    def codes(self, scaled: Tensor) -> Tensor:
        # What is not a number must stay one until the receiver refuses it: its block's scale already is.
        return (scaled.nan_to_num() * 127).round().to(torch.int8).view(torch.uint8)

    def scaled(self, codes: Tensor, count: int) -> Tensor:
        return codes.view(torch.int8).float() / 127


class NormalFloat4(Blockwise):
    """Four bits a value, spaced like the quantiles of a normal distribution; two to a byte."""

    name = "nf4"
    paper = "arXiv:2305.14314"
    block = 64

    def code_bytes(self, count: int) -> int:
        return math.ceil(count / 2)

    def codes(self, scaled: Tensor) -> Tensor:
        nearest = torch.bucketize(scaled.nan_to_num(), (NF4[1:] + NF4[:-1]) / 2).to(torch.uint8)
        pairs = torch.nn.functional.pad(nearest, (0, len(nearest) % 2)).reshape(-1, 2)
        return (pairs[:, 0] << 4) | pairs[:, 1]

    def scaled(self, codes: Tensor, count: int) -> Tensor:
        return NF4[torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)[:count].long()]


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
