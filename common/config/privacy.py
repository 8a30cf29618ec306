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
    ``train.accumulation`` plays no part).
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

    @property
    def on(self) -> bool:
        """Whether no figure may leave a node that noise does not cover."""
        return self.mode != "none"

    @property
    def per_example(self) -> bool:
        """Whether training is private as a whole, each example's gradient clipped and the sums noised."""
        return self.mode == "example"

    @property
    def whole_change(self) -> bool:
        """Whether a node noises the change of its round as a whole."""
        return self.mode == "update-local"

    @property
    def central(self) -> bool:
        """Whether the coordinator, which is trusted then, noises the mean of the nodes' changes."""
        return self.mode == "update-central"

    @property
    def guarded(self) -> bool:
        """Whether nothing that the records decide may leave a node, but for what its own noise covers."""
        return self.per_example or self.whole_change

    @property
    def scored(self) -> bool:
        """Whether held-out units are scored under noise of the node's own."""
        return self.per_example and self.score_noise > 0
