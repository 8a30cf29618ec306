"""Codecs of a few bits a value, and a float32 scale a block: the codes travel first, then the scales."""

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from common.wire.codec import Array, Codec

# The 16 values of NormalFloat4, quantiles of the normal distribution: Dettmers et al., QLoRA, arXiv:2305.14314, app. E.
NF4 = torch.tensor(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)


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
