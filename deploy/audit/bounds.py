"""A lower bound on the privacy lost, from how often a guesser was right.

Both bounds hold for every mechanism, since they are about guesses and know nothing of the mechanism; what they are sure
of is a share of all audits. An audit that says little has tried little: only a bound above the claim proves anything.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

MOST = 30.0
"""The largest epsilon that is looked for: no number of runs could show more."""


def from_coins(coins: int, guesses: int, right: int, delta: float, doubt: float) -> float:
    """Epsilon, at least, but for a chance of ``doubt``, if ``right`` of ``guesses`` about fair coins were right.

    Each of ``coins`` decided whether a record of its own was there; the guesser was free to choose which of them it
    guesses, but not how many. Theorem 5.2 of Steinke, Nasr and Jagielski (arXiv:2305.08846), the most that guesses can
    be right under epsilon and ``delta``, turned round.
    """

    def chance(epsilon: float) -> float:
        chances = _binomial(guesses, 1 / (1 + math.exp(-epsilon)))
        # What delta can add: it makes up for i wrong guesses with a chance of 2 coins delta / i.
        missed = np.cumsum(chances[:right][::-1]) / np.arange(1, right + 1)
        return float(chances[right:].sum() + 2 * coins * delta * missed.max(initial=0.0))

    return _first(lambda epsilon: chance(epsilon) >= doubt, MOST)


def from_pairs(inside: Sequence[float], outside: Sequence[float], delta: float, doubt: float) -> float:
    """Epsilon, at least, but for a chance of ``doubt``, from the scores of as many runs with a record as without.

    The threshold is chosen on one half of the runs and tried on the other, with a Clopper-Pearson bound of each rate
    (Jagielski, Ullman and Oprea, arXiv:2006.07709). Scores above it may tell the record, and those below its absence.
    """
    half = len(inside) // 2
    with_it, without = np.asarray(inside), np.asarray(outside)
    threshold = max(
        (*inside[:half], *outside[:half]),
        key=lambda score: float(np.mean(with_it[:half] > score) - np.mean(without[:half] > score)),
    )
    rest = len(inside) - half
    hits, alarms = (int(np.sum(scores[half:] > threshold)) for scores in (with_it, without))
    at_least, at_most = _rate_at_least(hits, rest, doubt / 2), 1 - _rate_at_least(rest - alarms, rest, doubt / 2)
    told, absent = (at_least - delta) / at_most, (1 - at_most - delta) / (1 - at_least)
    return math.log(max(1.0, told, absent))


def _rate_at_least(hits: int, tries: int, doubt: float) -> float:
    """Clopper and Pearson's lower bound of a rate, but for a chance of ``doubt``."""
    return _first(lambda rate: float(_binomial(tries, rate)[hits:].sum()) >= doubt, 1.0)


def _first(reached: Callable[[float], bool], most: float) -> float:
    """From where on, between 0 and ``most``, something that stays so once it is so is so: a little before."""
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low if low > 1e-9 else 0.0


def _binomial(tries: int, rate: float) -> NDArray[np.float64]:
    """The chances of 0 to ``tries`` successes, each of a chance of ``rate``, which is neither 0 nor 1."""
    k = np.arange(tries + 1)
    ways = np.array([math.lgamma(tries + 1) - math.lgamma(i + 1) - math.lgamma(tries - i + 1) for i in k])
    chances: NDArray[np.float64] = np.exp(ways + k * math.log(rate) + (tries - k) * math.log1p(-rate))
    return chances
