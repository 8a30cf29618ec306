"""The privacy of a run: one section of its config."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from common.config.ranges import LEAST_CLIP, LEAST_NOISE, MOST_CLIP, MOST_NOISE, Count, Delta
from common.config.section import Section

Mode = Literal["none", "example", "update-local", "update-central"]


def _noise(multiplier: float) -> float:
    if multiplier and not LEAST_NOISE <= multiplier <= MOST_NOISE:
        raise PydanticCustomError("noise_multiplier", "0, or a number from 0.01 to 1,000,000")
    return multiplier


class PrivacyConfig(Section):
    """Differential privacy: of single examples (DP-SGD), or of a node's whole change, noised here or on the mean.

    ``epsilon`` and ``delta`` are for the whole run of one node that takes part in every round. ``noise_multiplier`` is
    sigma over what one neighbour can move: ``clip``, or for ``update-local`` 2 ``clip``; 0 lets ``epsilon`` decide.
    ``clip`` bounds the norm of a unit's gradient, or of the change; where ``clip_quantile`` is not 0, it starts there
    and follows that quantile of the norms. ``unit`` is what one of two neighbours has more: a ``record``, or all that
    have one value of the field it names, of which ``unit_cap`` at most are read. ``records`` is the public number of
    units of a node, for nodes whose operator names none; the true one is never used. ``score_noise`` is the noise
    multiplier of a score on held-out units, 0 for no score.
    ``expected_batch`` is the mean size of a Poisson batch, computed ``train.batch_size`` at a time (and
    ``train.accumulation`` plays no part); ``engine`` is how per-example gradients are had.
    """

    mode: Mode = "none"
    epsilon: Annotated[float, Field(ge=1e-3, le=1e4)] = 8.0
    delta: Delta = 1e-5
    noise_multiplier: Annotated[float, AfterValidator(_noise)] = 0.0
    clip: Annotated[float, Field(ge=LEAST_CLIP, le=MOST_CLIP)] = 1.0
    clip_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    unit: str = "record"
    unit_cap: Count = 8
    records: Annotated[int, Field(ge=0, le=10**9)] = 0
    score_noise: Annotated[float, AfterValidator(_noise)] = 0.0
    clipping: Literal["flat", "automatic"] = "flat"
    expected_batch: Annotated[int, Field(ge=1, le=10**9)] = 64
    accountant: Literal["prv", "rdp"] = "prv"
    engine: Literal["fast", "hooks"] = "fast"
