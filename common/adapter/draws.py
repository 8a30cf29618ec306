"""Random tensors that every machine draws to the bit alike.

A coordinator and its nodes draw the same tensors and compare them by digest, so nothing here may depend on the number
of threads or on the CPU: torch's normal and uniform draws, its sums and its decompositions all do, in their last bits.
Integers are drawn, which is exact, and what follows is single additions and multiplications, element by element, which
IEEE arithmetic rounds alike everywhere.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 2**24
"""The values that a uniform draw can take: float32 has all of them."""
SUMMANDS = 12
"""So many uniform draws on an interval of 1 have a sum of variance 1."""
WORD = 32
"""The bits of one hashed integer."""
STAGES = 6
"""Random rotations one after the other: so many that the entries of the rows are as good as normal."""


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    """Uniform values in [-bound, bound), float32."""
    return _centred(shape, generator).float() * bound


def kaiming(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """A as PEFT draws it (Kaiming uniform, a = sqrt 5), ``rank x width``."""
    return uniform((rank, width), 1 / math.sqrt(width), generator)


def normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """Nearly normal values of mean 0: sums of :data:`SUMMANDS` uniform ones, float32."""
    total = _centred(shape, generator)
    for _ in range(SUMMANDS - 1):
        total += _centred(shape, generator)
    return (total * (std / 2)).float()


def signs(seeds: Tensor, count: int, name: str) -> Tensor:
    """A row of ``count`` values of 1 and -1 for each of ``seeds`` (int64), float64, on their device.

    They are bits of a hash of the seed, the place and the ``name``, so that any row is had without the others.
    """
    places = torch.arange(-(-count // WORD), device=seeds.device)
    words = _hashed(_hashed(seeds + layer_seed(0, 0, name) % 2**31)[:, None] ^ _hashed(places))
    bits = words[:, :, None] >> torch.arange(WORD, device=seeds.device) & 1
    return bits.flatten(1)[:, :count].double() * 2 - 1


def orthonormal_rows(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows, ``rank x width``; rows beyond ``width`` are zero, as no more can be orthonormal.

    Different rows of the identity, turned by random rotations: signs, an order of the coordinates, and a Hadamard
    transform (Ailon and Chazelle, *The Fast Johnson-Lindenstrauss Transform*), which adds and subtracts alone.
    """
    count = min(rank, width)
    rows = torch.zeros(rank, width, dtype=torch.float64)
    rows[torch.arange(count), torch.randperm(width, generator=generator)[:count]] = 1.0
    size = 1 << (width.bit_length() - 1)
    for stage in range(STAGES):
        signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
        rows = (rows * signs)[:, torch.randperm(width, generator=generator)]
        # A transform has a power of two of coordinates: the first ones, the last ones, and so on in turn.
        turned = slice(0, size) if stage % 2 == 0 else slice(width - size, width)
        rows[:, turned] = _hadamard(rows[:, turned])
    return rows.float()


def layer_seed(seed: int, round: int, layer: str) -> int:
    """The seed of what is drawn anew for a layer, or a step, in the state of ``round``, in a run of this ``seed``."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{round}/{layer}".encode()).digest()[:7])


def _centred(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Multiples of ``2 / STEPS`` in [-1, 1), float64 and exact."""
    drawn = torch.randint(0, STEPS, tuple(shape), generator=generator).double()
    return (drawn - STEPS / 2) * (2 / STEPS)


def _hashed(words: Tensor) -> Tensor:
    """A hash of the lower :data:`WORD` bits: *lowbias32* of Wellons' Hash Prospector.

    Its second factor is 0x846ca68b - 2^32, so that no product leaves int64, where machines might differ.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):
        words = words ^ words >> shift
        words = words * factor & 2**WORD - 1
    return words ^ words >> 16


def _hadamard(rows: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of each row, whose width is a power of two."""
    count, width = rows.shape
    half = 1
    while half < width:
        pairs = rows.reshape(count, width // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([first + second, first - second], dim=2).reshape(count, width)
        half *= 2
    return rows * math.sqrt(1 / width)
