"""A clip that follows a quantile of the gradients' norms: no tuning by runs that each cost budget.

Andrew et al., *Differentially Private Learning with Adaptive Clipping*, arXiv:1905.03871. Beside the sum, a step gives
away how many of its units' gradients were within the clip C, under noise s of its own:

    b = 1/2 + (sum_i (b_i - 1/2) + N(0, s^2)) / B        C <- C exp(-eta (b - gamma))

with b_i in {0, 1}, B the expected batch and gamma the quantile. A unit moves the count by 1/2 and the sum by C, so both
together cost what one Gaussian mechanism of noise multiplier z does, where the sum has (their theorem 1)

    z_sum = (z^-2 - (2 s)^-2)^(-1/2)
"""

import math

import torch

from common.config.privacy import PrivacyConfig
from common.config.ranges import LEAST_CLIP, MOST_CLIP
from common.error import BouquetError
from common.privacy.gaussian import Gaussian

RATE = 0.2
"""Eta, the paper's."""

COUNT_SHARE = 0.05
"""The count's noise s as a share of the expected batch, the paper's."""


class Clip:
    """The norm that gradients are clipped to, step by step; one that stays where no quantile is asked for."""

    def __init__(self, privacy: PrivacyConfig, noise_multiplier: float) -> None:
        """``noise_multiplier`` is what a step costs in all. Raises :class:`BouquetError` where no noise is left."""
        self.norm = privacy.clip
        self._quantile = privacy.clip_quantile
        self._batch = privacy.expected_batch
        self._noise_multiplier = noise_multiplier
        self._count_noise = COUNT_SHARE * privacy.expected_batch
        if self._quantile and noise_multiplier:
            left = noise_multiplier**-2 - (2 * self._count_noise) ** -2
            if left <= 0:
                raise BouquetError(
                    "the batch is too small to noise its count beside the sum",
                    where="privacy.clip-quantile, privacy.expected-batch",
                    expected=f"an expected batch above {noise_multiplier / (2 * COUNT_SHARE):.0f}",
                    got=str(self._batch),
                )
            self._noise_multiplier = left**-0.5

    @property
    def mechanism(self) -> Gaussian:
        """What noises the sum of gradients that are clipped to :attr:`norm`."""
        return Gaussian(self.norm, self._noise_multiplier)

    def follow(self, surplus: float) -> None:
        """Move towards the quantile; ``surplus`` is the sum of ``b_i - 1/2`` over the step's units."""
        if not self._quantile:
            return
        count = Gaussian(0.5, 2 * self._count_noise if self._noise_multiplier else 0.0)
        ((_, noised),) = count.release({"count": torch.tensor([surplus], dtype=torch.float64)})
        within = 0.5 + noised.item() / self._batch
        moved = self.norm * math.exp(-RATE * (within - self._quantile))
        self.norm = min(max(moved, LEAST_CLIP), MOST_CLIP)
