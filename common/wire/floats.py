"""Codecs that keep a value as a float of 32 or 16 bits. Flower's arrays know numpy's types only."""

import torch
from torch import Tensor

from common.wire.codec import Array, Codec


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
