"""What the coordinator alone goes by: when a round is over, what is scored, and what is kept and told of a run."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.ranges import Count, CountOrOff, NonNegative, Only, Positive, Share
from common.config.section import Section

TRACKERS = ("tensorboard", "mlflow", "wandb")


class EvaluationConfig(Section):
    """When held-out examples are scored, and what comes of it.

    The nodes score a state before they train on it, so that a score comes with the round after its own.
    """

    every: CountOrOff = 1
    """Rounds from one scoring to the next; 0 scores before the first and after the last alone."""
    batch_size: Count = 16
    """Examples that are scored at a time."""
    limit: CountOrOff = 0
    """How many held-out examples a node scores at most; 0 for all."""
    source: str = ""
    """The coordinator's own held-out data, for which it loads the base model; empty for none."""
    prompt: str = "def "
    """What a generative model continues before and after the run; empty for nothing."""
    export: Literal["best", "last"] = "best"
    """Which round's model the run leaves: that of the least held-out loss, where it is known, or the last."""


class RoundConfig(Section):
    """When a round is over, and when the run is; what a node may send. The record shows which sizes are usual.

    A round counts if enough of the nodes that belong to the run, or of the share that is asked, have replied. Patience
    goes by what most of the nodes' own losses do, of four nodes or more, else by the loss over all.
    """

    deadline: Positive = 3600.0
    """Seconds after which a round goes on without those that have not replied."""
    wait: Positive = 300.0
    """Seconds that each try of a round waits for `min-nodes` nodes."""
    min_replies: Share = 0.5
    """The share of the nodes asked that must have replied for a round to count."""
    fewest_replies: Count = 1
    """How many nodes must have replied for a round to count."""
    retries: CountOrOff = 2
    """How often a round that does not count is tried again, after one second, two, four."""
    patience: CountOrOff = 0
    """Scorings without a better loss after which the run stops, as it learns a round later; 0 never stops early."""
    max_failures: CountOrOff = 2
    """Failures in a row after which a node is left out; 0 for never."""
    sit_out: CountOrOff = 3
    """Rounds for which such a node is left out."""
    max_norm: NonNegative = 1e4
    """The largest norm of what one node changes; 0 for any."""
    max_ratio: NonNegative = 20.0
    """How many times the median of the others' that norm may be; 0 for any."""
    max_weight: NonNegative = 1000.0
    """How many times the median of the others' a claimed weight may be; 0 for any."""

    @property
    def ttl(self) -> float:
        """How long a message is valid: past the deadline, so that a late reply is seen and counted."""
        return 2 * self.deadline


def _known_trackers(to: str) -> bool:
    return all(name in TRACKERS for name in filter(None, (part.strip() for part in to.split(","))))


class TrackingConfig(Section):
    """Where the figures of the record go besides."""

    to: Annotated[str, Only(_known_trackers, f"a comma-separated list of {', '.join(TRACKERS)}")] = ""
    """Trackers that get the figures of the record besides, with commas; empty for none."""

    @property
    def names(self) -> list[str]:
        """The trackers, each once."""
        return list(dict.fromkeys(filter(None, (part.strip() for part in self.to.split(",")))))


class MetricsConfig(Section):
    """Where the coordinator answers Prometheus while a run lasts."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port on which the coordinator answers Prometheus while a run lasts; 0 for none."""
    address: str = "127.0.0.1"
    """The address that it listens on."""


class CheckpointConfig(Section):
    """Which checkpoints stay."""

    newest: Count = 3
    """How many of the newest checkpoints stay."""
    every: CountOrOff = 0
    """Rounds from one further checkpoint that stays to the next; 0 for none."""
