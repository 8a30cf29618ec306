"""What a private run costs: epsilon from releases, and noise from epsilon, by Opacus's accountants.

The noise multiplier is the noise's standard deviation over the most that the released sum can move between neighbours.
What neighbours are is the mechanism's to say: one example more or less, or another data set. Composition is Opacus's;
nothing of it is our own.

Opacus's PRV accountant (Gopi, Lee, Wutschitz, arXiv:2106.02848) is tight, and its figure is an upper bound; RDP
(Mironov, arXiv:1702.07476) is looser and needs next to nothing. Opacus is imported by the first call: it takes seconds.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from common.config import PrivacyConfig
from common.error import BouquetError

Accountant = Literal["prv", "rdp"]

# PRV's mesh grows with epsilon, to gigabytes; where RDP says more than this, no promise is left to make tighter.
LOOSE = 100.0


@dataclass(frozen=True)
class Release:
    """What one round of one node gives away: ``steps`` Gaussian mechanisms, each on a Poisson sample of the examples.

    ``noise_multiplier`` is the noise's deviation over the sensitivity; ``sample_rate`` is an example's chance to be in
    one step. A whole change that is noised is one step of sample rate 1. Raises :class:`BouquetError` on a value out
    of range.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        for name, value, valid, expected in (
            ("noise multiplier", self.noise_multiplier, 0 <= self.noise_multiplier < math.inf, "0 or more"),
            ("sample rate", self.sample_rate, 0 < self.sample_rate <= 1, "above 0, at most 1"),
            ("steps", self.steps, self.steps >= 1, "1 or more"),
        ):
            if not valid:
                raise BouquetError("a release that cannot be accounted", where=name, expected=expected, got=str(value))


def epsilon(releases: Sequence[Release], delta: float, accountant: Accountant) -> float:
    """An upper bound of epsilon, at ``delta``, over all ``releases``; infinite where one of them has no noise."""
    totals: Counter[tuple[float, float]] = Counter()
    for release in releases:
        totals[release.noise_multiplier, release.sample_rate] += release.steps
    return _epsilon(tuple((*mechanism, steps) for mechanism, steps in sorted(totals.items())), delta, accountant)


@lru_cache(maxsize=4096)
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant) -> float:
    """The least noise, to 0.01 of epsilon, with which ``steps`` keep to ``epsilon`` at ``delta``.

    Raises :class:`BouquetError` where no noise is enough.
    """
    from opacus.accountants.utils import get_noise_multiplier

    mechanism = accountant if epsilon < LOOSE else "rdp"
    try:
        with _quiet():
            found = get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps, accountant=mechanism
            )
    except ValueError as error:
        raise BouquetError(
            "no noise is enough",
            where="privacy.epsilon",
            expected=f"an epsilon that {steps} steps of sample rate {sample_rate:.4g} can keep to at delta {delta:g}",
            got=f"{epsilon:g}",
            cure="Raise privacy.epsilon, lower train.steps or num-server-rounds, or use privacy.accountant = 'prv'.",
        ) from error
    return float(found)


def plan(privacy: PrivacyConfig, examples: int, steps_per_round: int, rounds: int) -> Release:
    """The release of each round of a node with ``examples`` that takes part in every one of ``rounds``.

    Its noise is ``privacy.noise_multiplier`` where that is set; else as much as ``privacy.epsilon`` asks for.
    """
    whole_change = privacy.mode != "example"
    sample_rate = 1.0 if whole_change else min(1.0, privacy.expected_batch / examples)
    steps = 1 if whole_change else steps_per_round
    noise = privacy.noise_multiplier or noise_multiplier(
        privacy.epsilon, privacy.delta, sample_rate, steps * rounds, privacy.accountant
    )
    return Release(noise, sample_rate, steps)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    from opacus.accountants import create_accountant

    if not history:
        return 0.0
    if history[0][0] == 0:
        return math.inf

    def spent(mechanism: Accountant) -> float:
        account = create_accountant(mechanism)
        account.history = list(history)
        with _quiet():
            return float(account.get_epsilon(delta))

    loose = spent("rdp")
    return loose if accountant == "rdp" or loose > LOOSE else spent("prv")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Opacus's advice on its own orders, and numpy's on log(0) where the sample rate is 1: neither is wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", message="divide by zero encountered in log")
        yield
