"""The tables of a node's policy, as its file has them."""

from collections.abc import Iterator, Sequence

from common.config.privacy import Mode
from common.config.ranges import CountOrOff, NonNegative
from common.config.run import RunConfig
from common.config.section import Section


class CostPolicy(Section):
    """What a run may take of this machine; 0 for any. The defaults are beyond honest runs and end the others."""

    rank: CountOrOff = 1024
    steps: CountOrOff = 100_000
    epochs: CountOrOff = 1000
    batch_size: CountOrOff = 4096
    max_length: CountOrOff = 131_072
    labels: CountOrOff = 100_000

    def mistakes(self, config: RunConfig) -> Iterator[str]:
        """What a run asks for beyond it."""
        train, task = config.train, config.task
        for key, got, limit, name in (
            ("lora.rank", config.lora.rank, self.rank, "rank"),
            ("train.steps * train.accumulation", train.steps * train.accumulation, self.steps, "steps"),
            ("train.epochs", train.epochs, self.epochs, "epochs"),
            ("train.batch-size", train.batch_size, self.batch_size, "batch-size"),
            ("evaluation.batch-size", config.evaluation.batch_size, self.batch_size, "batch-size"),
            ("task.max-length", task.max_length, self.max_length, "max-length"),
            ("task.labels", task.labels, self.labels, "labels"),
        ):
            if got > limit > 0:
                yield f"{key}: expected at most {limit:,} (cost.{name}), got {got:,}"


class DataPolicy(Section):
    """What a coordinator may name on a node that has no ``data`` of its own."""

    sources: Sequence[str] = ("stdlib",)


class TellPolicy(Section):
    """What may leave beside tensors, named numbers and fixed sentences."""

    text: bool = False
    details: bool = False


class PrivacyPolicy(Section):
    """How private a run must be."""

    modes: Sequence[Mode] = ()
    unit: str = ""
    scoring: bool = False
    largest_batch: CountOrOff = 0
    max_epsilon: NonNegative = 0.0
    min_noise_multiplier: NonNegative = 0.0


class BudgetPolicy(Section):
    """What makes two records one: the fields whose values they share. Without fields the node has one budget."""

    fields: Sequence[str] = ()
