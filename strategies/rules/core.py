"""Rules that train a small core between two frozen, orthonormal frames: ``W_0 + B R A``."""

from dataclasses import dataclass

from common.adapter.core import Core
from common.adapter.structure import Structure
from strategies.rules.rule import MeanRule


@dataclass(frozen=True, kw_only=True)
class CoreRule(MeanRule):
    """A mean of cores. The frames are common, so the mean is exact, and orthonormal, so there is no alpha to tune."""

    init = "orthonormal"
    learning_rate = 2e-2

    @property
    def structure(self) -> Structure:
        """One core of the whole rank."""
        return Core()
