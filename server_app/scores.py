"""What a node reports of a state on its held-out examples, read with suspicion."""

from collections.abc import Mapping
from statistics import median

from flwr.app import Message, MetricRecord

from common.error import BouquetError, brief
from common.tasks import Score, Task
from server_app.scrutiny import FEWEST
from strategies.replies import LARGEST_FIGURE, Metrics, read_metrics

MOST = 2**31
"""Of held-out examples or tokens."""
MOST_TALLIED = 2**62
"""Of what is counted of them, or summed in parts of a unit."""
WORST = 1e6
"""Of a loss: far above that of a model which is sure of what is wrong."""
TIMES = 100.0
"""A node that counts so many times more than the others' median would be the overall score by itself."""


def read_score(message: Message, task: Task, record: str = "metrics") -> tuple[Score, Metrics]:
    """The sums in a ``record`` of a reply, and its figures.

    Raises :class:`BouquetError` on what ``task`` could not have said.
    """
    metrics = read_metrics(message, "loss", "correct", "count", record=record)
    count, correct, loss = metrics["count"], metrics["correct"], metrics["loss"]
    if not 1 <= count <= MOST:
        raise BouquetError("a score over no examples", expected=f"a count of 1 to {MOST:,}", got=brief(count))
    if loss > WORST:
        raise BouquetError("a loss out of range", expected=f"at most {WORST:g}", got=brief(loss))
    told = message.content.metric_records.get("tallies") or MetricRecord()
    tallies = {}
    for name, size in task.tally_sizes().items():
        values = told.get(name)
        if not (isinstance(values, list) and len(values) == size and all(map(_is_tally, values))):
            raise BouquetError(
                "a score without its tallies",
                where=name,
                expected=f"{size} whole numbers from 0",
                got=f"{len(values)} others" if isinstance(values, list) else brief(values),
            )
        tallies[name] = tuple(int(value) for value in values)
    score = Score(loss * count, int(correct), int(count), tallies)
    if correct > count or not task.adds_up(score):
        raise BouquetError("a score that does not add up", expected=f"parts of {count:g}", got=f"{correct:g} right")
    return score, metrics


def read_noised(message: Message, task: Task, record: str = "metrics") -> tuple[Score, Metrics]:
    """The score that a noised sum of merits and a noised count stand for, and no other figure."""
    metrics = read_metrics(message, "merit", "count", record=record, least=-LARGEST_FIGURE)
    count = min(max(1.0, metrics["count"]), float(MOST))
    return task.score_of(min(max(0.0, metrics["merit"]), count), count), {}


def overall(scores: Mapping[str, Score]) -> tuple[Score, list[str]]:
    """The sum of the nodes' scores, and the nodes that are left out of it because they claim to count too much."""
    left_out = []
    if len(scores) >= FEWEST:
        for node, score in scores.items():
            usual = median(other.count for name, other in scores.items() if name != node)
            if score.count > TIMES * usual:
                left_out.append(node)
    return sum((score for node, score in sorted(scores.items()) if node not in left_out), Score()), left_out


def judged(scores: Mapping[str, Score]) -> float:
    """The loss by which a round is known: the median of the nodes' own, which none of them can push out of all bounds.

    Of fewer than four nodes it is the loss over all examples.
    """
    if len(scores) >= FEWEST:
        return median(score.loss / score.count for score in scores.values())
    total = sum(scores.values(), Score())
    return total.loss / total.count


def _is_tally(value: float) -> bool:
    return isinstance(value, int) and 0 <= value <= MOST_TALLIED
