"""What a node says of a state on its held-out examples, read with suspicion."""

from flwr.app import Message, MetricRecord

from common.error import BouquetError
from common.tasks import Score, Task
from strategies.strategy import Metrics, read_metrics


def read_score(message: Message, task: Task) -> tuple[Score, Metrics]:
    """The sums in a reply, and its figures. Raises :class:`BouquetError` on what ``task`` could not have said."""
    metrics = read_metrics(message, "loss", "correct", "count")
    count = int(metrics["count"])
    if count < 1:
        raise BouquetError("a score of nothing", expected="a count of 1 or more", got=str(count))
    record = message.content.metric_records.get("tallies") or MetricRecord()
    tallies = {}
    for name, size in task.tally_sizes().items():
        values = record.get(name)
        if not (isinstance(values, list) and len(values) == size and all(_is_count(value) for value in values)):
            raise BouquetError(
                "a score without its tallies",
                where=name,
                expected=f"{size} whole numbers from 0",
                got=f"{len(values)} others" if isinstance(values, list) else str(values)[:80],
            )
        tallies[name] = tuple(int(value) for value in values)
    return Score(metrics["loss"] * count, int(metrics["correct"]), count, tallies), metrics


def read_noised(message: Message, task: Task) -> tuple[Score, Metrics]:
    """The score that a noised sum of merits and a noised count stand for, and no other figure."""
    metrics = read_metrics(message, "merit", "count")
    count = max(1.0, metrics["count"])
    return task.score_of(min(max(0.0, metrics["merit"]), count), count), {}


def _is_count(value: float) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31
