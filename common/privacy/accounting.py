"""What a private run costs: epsilon from releases, and noise from epsilon, by Opacus's accountants.

The noise multiplier is the noise's standard deviation over the most that the released sum can move between neighbours.
What neighbours are is the mechanism's to say: one example more or less, or another data set. Composition is Opacus's;
nothing of it is our own.

Opacus's PRV accountant (Gopi, Lee, Wutschitz, arXiv:2106.02848) is tight, and its figure is an upper bound; RDP
(Mironov, arXiv:1702.07476) is looser and needs next to nothing. Opacus is imported by the first call: it takes seconds.

What is accounted comes from other machines, so every number has bounds within which both accountants end in seconds
with a finite figure. PRV's time and memory are its mesh; where that would be too fine, RDP's bound stands.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from common.config.privacy import Mode, PrivacyConfig
from common.config.ranges import LEAST_DELTA, LEAST_NOISE, MOST_DELTA, MOST_NOISE
from common.error import BouquetError

Accountant = Literal["prv", "rdp"]

# Noise multiplier, sample rate and steps of each mechanism, as Opacus has it.
History = tuple[tuple[float, float, int], ...]

# PRV fails far out; where RDP says more than this, no promise is left to make tighter.
LOOSE = 100.0

# PRV's own tolerances, and the points that its mesh may have: about two seconds and 300 MB.
EPSILON_ERROR, DELTA_ERROR = 0.01, 1e-3
MESH_POINTS = 2**22

# Below it, what PRV loses in rounding is as much as delta.
PRV_DELTA = 1e-12


@dataclass(frozen=True)
class Release:
    """What one round of one node gives away: ``steps`` Gaussian mechanisms, each on a Poisson sample of the examples.

    ``noise_multiplier`` is the noise's deviation over the sensitivity; ``sample_rate`` is an example's chance to be in
    one step. A whole change that is noised is one step of sample rate 1. Raises :class:`BouquetError` on a value that
    no accountant can be asked about.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        noise = self.noise_multiplier
        _check("noise multiplier", noise, noise == 0 or LEAST_NOISE <= noise <= MOST_NOISE, "0, or 0.01 to 1e6")
        _check("sample rate", self.sample_rate, 1e-9 <= self.sample_rate <= 1, "1e-9 to 1")
        _check("steps", self.steps, 1 <= self.steps <= 10**9, "1 to 1e9")


def by_record(release: Release, mode: Mode) -> Release:
    """A release as one record sees it, which is what a node's budget pays for.

    Under ``update-central`` the noise is measured by the norm C of a node's whole change, as fits one node more or
    less. Another record can turn the change round, by 2 C: for a record that is half the noise multiplier.
    """
    return replace(release, noise_multiplier=release.noise_multiplier / 2) if mode == "update-central" else release


def by_node(release: Release, mode: str) -> Release:
    """The release that :func:`by_record` was given."""
    return replace(release, noise_multiplier=release.noise_multiplier * 2) if mode == "update-central" else release


def epsilon(releases: Sequence[Release], delta: float, accountant: Accountant) -> float:
    """An upper bound of epsilon, at ``delta``, over all ``releases``; infinite where one of them has no noise.

    Raises :class:`BouquetError` on a delta that no accountant can be asked about.
    """
    _check("delta", delta, LEAST_DELTA <= delta <= MOST_DELTA, "1e-15 to 0.1")
    totals: Counter[tuple[float, float]] = Counter()
    for release in releases:
        totals[release.noise_multiplier, release.sample_rate] += release.steps
    return _epsilon(tuple((*mechanism, steps) for mechanism, steps in sorted(totals.items())), delta, accountant)


def noise_multiplier(
    target: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant,
    beside: Sequence[Release] = (),
) -> float:
    """The least noise, to 0.01 of epsilon, with which ``steps``, and what is ``beside``, keep to ``target``.

    Opacus's search, over the figure that a budget is charged. Raises :class:`BouquetError` where no noise is enough.
    """

    def cost(noise: float) -> float:
        return epsilon([Release(noise, sample_rate, steps), *beside], delta, accountant)

    low, high = 0.0, 20.0
    if (found := cost(high)) > target and cost(MOST_NOISE) > target:
        raise BouquetError(
            "no noise is enough",
            where="privacy.epsilon",
            expected=f"an epsilon that {steps} steps of sample rate {sample_rate:.4g} can meet at delta {delta:g}",
            got=f"{target:g}",
            cure="Raise privacy.epsilon, lower train.steps or num-server-rounds, or set privacy.accountant = 'prv'.",
        )
    while found > target:
        high = min(2 * high, MOST_NOISE)
        found = cost(high)
    # The figure jumps where PRV takes over from RDP: there the search ends with the interval.
    while target - found > EPSILON_ERROR and high - low > 1e-6 * high and high > LEAST_NOISE:
        middle = max((low + high) / 2, LEAST_NOISE)
        if (cheaper := cost(middle)) < target:
            high, found = middle, cheaper
        else:
            low = middle
    return high


def plan(privacy: PrivacyConfig, records: int, steps_per_round: int, rounds: int, scores: int = 0) -> Release:
    """The release of each round of a node that takes part in every one of ``rounds``.

    ``records`` is the public number of its records, as its operator declares it: the true one would tell. The run
    scores the node ``scores`` times, each a release of ``privacy.score_noise`` where that is set.

    Its noise is ``privacy.noise_multiplier`` where that is set; else as much as ``privacy.epsilon`` asks for.
    """
    whole_change = not privacy.per_example
    sample_rate = 1.0 if whole_change else min(1.0, privacy.expected_batch / records)
    steps = 1 if whole_change else steps_per_round
    beside = [Release(privacy.score_noise, 1.0, scores)] if privacy.score_noise and scores else []
    noise = privacy.noise_multiplier or noise_multiplier(
        privacy.epsilon, privacy.delta, sample_rate, steps * rounds, privacy.accountant, beside
    )
    return Release(noise, sample_rate, steps)


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float, accountant: Accountant) -> float:
    if not history:
        return 0.0
    if history[0][0] == 0:
        return math.inf
    tight = accountant == "prv" and _fits_prv(history, delta)
    # Both formulas go below zero where delta alone is promise enough.
    found = _prv(history, delta) if tight else _rdp(history, delta)
    return math.inf if math.isnan(found) else max(0.0, found)


def _fits_prv(history: History, delta: float) -> bool:
    """Whether PRV can be asked: its mesh, as Opacus lays it out, is RDP's epsilon at a fraction of delta wide."""
    steps = sum(steps for _, _, steps in history)
    singles = (_rdp(((noise, rate, 1),), DELTA_ERROR * delta / (8 * steps)) for noise, rate, _ in history)
    width = max(_rdp(history, DELTA_ERROR * delta / 4), *singles)
    fineness = math.sqrt(steps * math.log(12 / (DELTA_ERROR * delta)) / 2) / EPSILON_ERROR
    small = len(history) * 2 * (width + 3) * fineness <= MESH_POINTS
    return small and delta >= PRV_DELTA and _rdp(history, delta) <= LOOSE


def _prv(history: History, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    account = PRVAccountant()
    account.history = list(history)
    with _quiet():
        return float(account.get_epsilon(delta, eps_error=EPSILON_ERROR, delta_error=DELTA_ERROR * delta))


def _rdp(history: History, delta: float) -> float:
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    curve = sum(steps * _curve(noise, rate) for noise, rate, steps in history)
    with _quiet():
        found, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=curve, delta=delta)
    return float(found)


@lru_cache(maxsize=4096)
def _curve(noise: float, rate: float) -> Any:
    """One step's Renyi divergence at each of Opacus's orders: up to four seconds at a rate of one half."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    with _quiet():
        return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise BouquetError("a release that cannot be accounted for", where=name, expected=expected, got=str(value))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Opacus's advice on its own orders, and numpy's on log(0) where the sample rate is 1: neither is wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", message="divide by zero encountered in log")
        yield
