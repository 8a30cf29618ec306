"""Rules that train a small core between two frozen, orthonormal frames: ``W_0 + B R A``."""

from dataclasses import dataclass, field

from common.adapter.core import Core
from common.adapter.structure import Structure
from common.method import GIVEN
from strategies.rules.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class CoreRule(MeanRule):
    """A mean of cores. The frames are common, so the mean is exact, and orthonormal, so there is no alpha to tune."""

    adapter: Structure = field(default_factory=Core, metadata={GIVEN: True})

    @classmethod
    def suits(cls, structure: Structure) -> bool:
        """A core between frozen frames."""
        return type(structure) is Core
