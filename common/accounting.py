"""What a private run costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """What one round of one node gives away: ``steps`` Gaussian mechanisms, each on a Poisson sample of the examples.

    ``noise_multiplier`` is sigma over the clipping norm; ``sample_rate`` is an example's chance to be in one step. A
    whole change that is noised is one step of sample rate 1.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
