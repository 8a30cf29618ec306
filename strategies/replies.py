"""What a reply says besides its tensors: why there are none, and figures."""

from collections.abc import Sequence

from flwr.app import Message

from common.error import BouquetError, RefusalError, brief

# Characters of a node's own explanation; a traceback's last frames fit.
MAX_REASON = 4000
# What a figure may be: a count, a loss, seconds or bytes.
LARGEST_FIGURE = 2.0**53
Metrics = dict[str, float]


def explained(refusal: Exception) -> str:
    """Why a reply is refused: our own words, or, of what broke on it unforeseen, the kind and the beginning."""
    if isinstance(refusal, BouquetError):
        return str(refusal)
    return f"a reply that cannot be read: {type(refusal).__name__}: {str(refusal)[:200]}"


def raise_failure(message: Message, record: str = "failure") -> None:
    """Raise :class:`BouquetError` if a reply reports an error of Flower's, or in its ``record`` one of the node's app.

    It is a :class:`RefusalError` where asking again will not help.
    """
    if message.has_error():
        reason = (message.error.reason or "no reason given").strip()[:MAX_REASON]
        raise BouquetError(f"Flower error {message.error.code}", got=reason)
    failure = message.content.config_records.get(record)
    if failure is not None:
        reason = brief(failure.get("reason", "no reason given"), MAX_REASON)
        raise (RefusalError if failure.get("refused") is True else BouquetError)(reason)


def read_metrics(message: Message, *needed: str, record: str = "metrics", least: float = 0.0) -> Metrics:
    """The figures in a ``record`` of a reply, each of them at least ``least``.

    Raises :class:`BouquetError` if one that is needed is missing, or one is not such a number.
    """
    figures = message.content.metric_records.get(record)
    if figures is None:
        got = brief(", ".join(message.content)) or "nothing"
        raise BouquetError(f"a reply without {record}", expected=f"a record '{record}'", got=got)
    metrics: Metrics = {}
    for name, value in figures.items():
        if isinstance(value, list) or not least <= value <= LARGEST_FIGURE:
            raise BouquetError(
                "a metric is not a number",
                where=brief(name),
                expected=f"one number from {least:g} to {LARGEST_FIGURE:g}",
                got=brief(value),
            )
        metrics[name] = value
    if missing := [name for name in needed if name not in metrics]:
        raise BouquetError("a reply lacks metrics", expected=", ".join(needed), got=f"none named {', '.join(missing)}")
    return metrics


def mean_metrics(weighted: Sequence[tuple[float, Metrics]]) -> Metrics:
    """The weighted mean of every metric that most of them have, over those that have it."""
    told: dict[str, list[tuple[float, float]]] = {}
    for weight, metrics in weighted:
        for name, value in metrics.items():
            told.setdefault(name, []).append((weight, value))
    return {
        name: sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)
        for name, values in told.items()
        if 2 * len(values) > len(weighted)
    }
