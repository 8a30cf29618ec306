"""Settings that only the coordinator uses: when a round ends, what is scored, and what is kept and reported."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.ranges import Count, CountOrOff, NonNegative, Only, Positive, Share
from common.config.section import Section

TRACKERS = ("tensorboard", "mlflow", "wandb")


class EvaluationConfig(Section):
    """When held-out examples are scored, and how the scores are used.

    The nodes score a state before they train on it, so a score arrives one round later.
    """

    every: CountOrOff = 1
    """Rounds between scorings; 0 scores only before the first round and after the last."""
    batch_size: Count = 16
    """Examples scored at a time."""
    limit: CountOrOff = 0
    """The most held-out examples that a node scores; 0 for all."""
    source: str = ""
    """The coordinator's own held-out data, for which it loads the base model; empty for none."""
    prompt: str = "def "
    """The prompt that a generative model continues before and after the run; empty for none."""
    export: Literal["best", "last"] = "best"
    """Which round's model the run exports: the one with the lowest held-out loss, where it is known, or the last."""


class RoundConfig(Section):
    """When a round ends, when the run ends, and what a node may send. The record shows which sizes are usual.

    A round counts if enough of the run's nodes, or of the share that is asked, have replied. Patience follows the
    losses of most nodes where there are four or more, and the overall loss otherwise.
    """

    deadline: Positive = 3600.0
    """Seconds after which a round continues without the nodes that have not replied."""
    wait: Positive = 300.0
    """Seconds that each attempt at a round waits for `min-nodes` nodes."""
    min_replies: Share = 0.5
    """The share of the nodes asked that must reply for a round to count."""
    fewest_replies: Count = 1
    """How many nodes must reply for a round to count."""
    retries: CountOrOff = 2
    """How often a round that does not count is retried, after one, two, then four seconds."""
    patience: CountOrOff = 0
    """Scorings without a better loss after which the run stops, known one round later; 0 never stops early."""
    max_failures: CountOrOff = 2
    """Consecutive failures after which a node is left out; 0 for never."""
    sit_out: CountOrOff = 3
    """Rounds for which such a node is left out."""
    max_norm: NonNegative = 1e4
    """The largest norm of one node's change; 0 for no limit."""
    max_ratio: NonNegative = 20.0
    """How many times the median of the other nodes' norms that norm may be; 0 for no limit."""
    max_weight: NonNegative = 1000.0
    """How many times the median of the other nodes' weights a claimed weight may be; 0 for no limit."""

    @property
    def ttl(self) -> float:
        """How long a message is valid: past the deadline, so that a late reply is seen and counted."""
        return 2 * self.deadline


def _known_trackers(to: str) -> bool:
    return all(name in TRACKERS for name in filter(None, (part.strip() for part in to.split(","))))


class TrackingConfig(Section):
    """Where else the record's figures go."""

    to: Annotated[str, Only(_known_trackers, f"a comma-separated list of {', '.join(TRACKERS)}")] = ""
    """Trackers that also receive the record's figures, separated by commas; empty for none."""

    @property
    def names(self) -> list[str]:
        """The trackers, each once."""
        return list(dict.fromkeys(filter(None, (part.strip() for part in self.to.split(",")))))


class MetricsConfig(Section):
    """Where the coordinator serves Prometheus metrics during a run."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port on which the coordinator serves Prometheus metrics during a run; 0 for none."""
    address: str = "127.0.0.1"
    """The address it listens on."""


class CheckpointConfig(Section):
    """Which checkpoints are kept."""

    newest: Count = 3
    """How many of the newest checkpoints are kept."""
    every: CountOrOff = 0
    """Rounds between further checkpoints that are kept; 0 for none."""
