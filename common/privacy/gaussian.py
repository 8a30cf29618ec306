"""The Gaussian mechanism: clipping, and unseeded noise on a grid.

A floating-point Gaussian gives its input away: some outputs are possible for one data set and impossible for its
neighbour (Mironov, CCS 2012). Here a sum S is rounded to a grid of step g and gets ``g round(sigma z / g)``, z standard
normal. A whole number moves in and out of a rounding, so

    round(S / g) + round(sigma z / g) = round(round(S / g) + sigma z / g)

is a post-processing of the ideal Gaussian mechanism on the rounded sum: every accountant of the Gaussian mechanism,
subsampled or not, holds as it is. The rounding moves two neighbouring sums apart by at most ``g sqrt(d)``; that, and
the error of floating-point sums, come out of :data:`MARGIN`.

The normals are exact: 126 bits of the operating system's randomness make a pair (Box-Muller) in float64, and where the
error bound leaves open to which whole number one of them rounds, more bits are drawn and mpmath decides. Taken on
trust are the operating system's generator, and that log, sqrt, sin and cos err by at most four units in the last place.
"""

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import mpmath
import torch
from torch import Tensor

MARGIN = 2.0**-9
"""The share of the sensitivity that clipping leaves free: half for the grid, half for floating-point sums."""

CHUNK = 2**16

K = TypeVar("K")


@dataclass(frozen=True)
class Gaussian:
    """Adds noise of standard deviation ``noise_multiplier * sensitivity`` to a sum.

    ``sensitivity`` bounds the norm by which two neighbouring sums differ.
    """

    sensitivity: float
    noise_multiplier: float

    @property
    def bound(self) -> float:
        """The norm by which the sums may differ before they are rounded."""
        return self.sensitivity * (1 - MARGIN)

    @property
    def deviation(self) -> float:
        """The standard deviation of what is added to each value."""
        return self.noise_multiplier * self.sensitivity

    def step(self, dimension: int) -> float:
        """The grid of a sum of so many coordinates: a power of two."""
        return 2.0 ** math.floor(math.log2(self.sensitivity * MARGIN / 2 / math.sqrt(dimension)))

    def release(self, total: Mapping[K, Tensor]) -> Iterator[tuple[K, Tensor]]:
        """The noised sum in float64, every value a multiple of :meth:`step`; as it was where the noise is zero.

        Tensor by tensor, because float64 copies of all of them would be most of what a step holds.
        """
        if not self.noise_multiplier:
            yield from total.items()
            return
        step = self.step(sum(tensor.numel() for tensor in total.values()))
        scale = self.deviation / step
        for key, tensor in total.items():
            noise = rounded_normal(tensor.numel(), scale, tensor.device).view_as(tensor)
            yield key, (tensor.double() / step).round_().add_(noise).mul_(step)


def clip(vector: Mapping[K, Tensor], bound: float) -> dict[K, Tensor]:
    """All tensors as one vector, scaled in float64 to a norm of at most ``bound``; zero if it is not finite."""
    doubles = {key: tensor.double() for key, tensor in vector.items()}
    # In units of the largest magnitude, in which no square overflows, and none that counts vanishes.
    magnitudes = [float(tensor.abs().max()) for tensor in doubles.values() if tensor.numel()]
    if not all(map(math.isfinite, magnitudes)):
        return {key: torch.zeros_like(tensor) for key, tensor in doubles.items()}
    if not (largest := max(magnitudes, default=0.0)):
        return doubles
    scaled = {key: tensor / largest for key, tensor in doubles.items()}
    norm = math.sqrt(sum(float(tensor.pow(2).sum()) for tensor in scaled.values()))
    return {key: tensor * (bound / norm) for key, tensor in scaled.items()} if norm * largest > bound else doubles


def rounded_normal(count: int, scale: float, device: torch.device) -> Tensor:
    """``count`` independent values of ``round(scale z)`` with z standard normal: whole numbers in float64."""
    values = torch.empty(2, (count + 1) // 2, dtype=torch.float64, device=device)
    for chunk in torch.split(values, CHUNK, dim=1):
        _fill(chunk, scale)
    return values.view(-1)[:count]


def _fill(pairs: Tensor, scale: float) -> None:
    """Box-Muller: ``z = sqrt(-2 ln u) (cos, sin)(2 pi v)``, u and v uniform, 63 bits each."""
    random = torch.frombuffer(bytearray(os.urandom(8 * pairs.numel())), dtype=torch.int64).to(pairs.device)
    bits = (random & (2**63 - 1)).view_as(pairs)
    u, angle = bits[0].double().add_(0.5).mul_(2.0**-63), bits[1].double().mul_(math.pi * 2.0**-62)
    radius = u.log().mul_(-2).abs_().sqrt_()  # u may be 1, and its logarithm -0
    torch.cos(angle, out=pairs[0])
    torch.sin(angle, out=pairs[1])
    pairs *= radius * scale
    # How far float64, and the bits that were not drawn, may have moved a value.
    error = (radius + 1).mul_(2.0**-48).add_((2.0**-63 / u).add_(2.0**-52).div_(radius)).mul_(scale)
    whole = pairs.round()
    doubtful = ((pairs - whole).abs_().add_(error) >= 0.5).any(dim=0)
    pairs.copy_(whole)
    for column in doubtful.nonzero().flatten().tolist():
        u_bits, v_bits = bits[:, column].tolist()
        pairs[:, column] = torch.tensor(_decide(u_bits, v_bits, scale), dtype=torch.float64)


def _decide(u_bits: int, v_bits: int, scale: float) -> tuple[float, float]:
    """The same pair to 192 more bits."""
    with mpmath.workprec(320):
        u, v = (mpmath.mpf((bits << 192) + secrets.randbits(192) + 1) / 2**255 for bits in (u_bits, v_bits))
        radius, angle = scale * mpmath.sqrt(-2 * mpmath.log(u)), 2 * mpmath.pi * v
        return float(mpmath.nint(radius * mpmath.cos(angle))), float(mpmath.nint(radius * mpmath.sin(angle)))
