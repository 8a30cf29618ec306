"""The privacy of a run: one section of its config."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.ranges import LEAST_CLIP, LEAST_NOISE, MOST_CLIP, MOST_NOISE, Count, Delta, Only
from common.config.section import Section

Mode = Literal["none", "example", "update-local", "update-central"]


Noise = Annotated[
    float,
    Only(
        lambda multiplier: not multiplier or LEAST_NOISE <= multiplier <= MOST_NOISE,
        f"0, or a number from {LEAST_NOISE:g} to {MOST_NOISE:,.0f}",
    ),
]


class PrivacyConfig(Section):
    """Differential privacy of single examples (DP-SGD), or of a node's whole change, noised on the node or on the mean.

    ``train.accumulation`` has no effect: a step is one Poisson batch.
    """

    mode: Mode = "none"
    """What is protected: nothing, single examples (DP-SGD), or a node's whole change, noised there or on the mean."""
    epsilon: Annotated[float, Field(ge=1e-3, le=1e4)] = 8.0
    """What the whole run costs a node that takes part in every round, at `privacy.delta`."""
    delta: Delta = 1e-5
    """The probability with which epsilon may fail to hold."""
    noise_multiplier: Noise = 0.0
    """The noise's standard deviation over the sensitivity, which is the clip, or twice the clip in `update-local`.

    0 derives it from epsilon.
    """
    clip: Annotated[float, Field(ge=LEAST_CLIP, le=MOST_CLIP)] = 1.0
    """The bound on the norm of a unit's gradient, or of a node's change."""
    clip_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The quantile of the norms that the clip follows after its start; 0 keeps it fixed."""
    unit: str = "record"
    """What is protected as one: a `record`, or all records with the same value of the field named here."""
    unit_cap: Count = 8
    """The most records of one unit that are read."""
    records: Annotated[int, Field(ge=0, le=10**9)] = 0
    """The public number of units on a node, for nodes whose operator declares none; the true number is never used."""
    score_noise: Noise = 0.0
    """The noise multiplier of a score on held-out units; 0 for no score."""
    clipping: Literal["flat", "automatic"] = "flat"
    """Whether only longer gradients are scaled down to the clip (flat), or all to almost that norm (automatic)."""
    expected_batch: Annotated[int, Field(ge=1, le=10**9)] = 64
    """The mean number of units in a Poisson batch, computed `train.batch-size` at a time."""
    accountant: Literal["prv", "rdp"] = "prv"
    """How releases are composed: by the privacy loss distribution (prv), or by Rényi divergences (rdp)."""

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
