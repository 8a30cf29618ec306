"""What a record says in a field: one reading for every task, for labels and for partitions.

A text is a text, and a number or a truth value is its text as Python writes it, whatever the words: "NA", "None", 0 and
False are answers. Null, nothing and blanks are no text, for which a record is left out and counted. A list or an object
is none either, and is refused, since what was meant by it cannot be guessed.
"""

import math
from collections.abc import Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

from common.error import BouquetError

# Why a record is left out: the word that travels, and how it is told.
REASONS = {
    "text": "without text",
    "answer": "without an answer",
    "label": "without a label",
    "positive": "without a positive",
    "negative": "without a negative",
    "image": "without an image",
    "short": "too short to learn from",
    "room": "without room for an answer",
}


class LeftOut(Exception):  # noqa: N818 - it is no error of anybody's
    """A record that holds nothing to learn; ``reason`` is one of :data:`REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


def words(value: Any, name: str) -> str:
    """The value of the field ``name`` as text; empty where it is none.

    Raises :class:`BouquetError` on a list, an object or bytes.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, int | float | Decimal | date | time):
        return str(value)
    raise BouquetError(
        "a field is not text",
        where=f"field '{name}'",
        expected="text, a number, true or false",
        got="a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else type(value).__name__,
        cure="Set task.name=chat for conversations; otherwise name another field with the task.* keys.",
    )


def text(record: Mapping[str, Any], name: str, reason: str = "text") -> str:
    """The text in a field. Raises :class:`LeftOut` where there is none, :class:`BouquetError` on what is no text."""
    if not (said := words(record.get(name), name)):
        raise LeftOut(reason)
    return said


def in_order(found: Iterable[str]) -> list[str]:
    """Each of the values once: by number where all are numbers, else by the alphabet."""
    different = sorted(set(found))
    try:
        return sorted(different, key=Decimal)
    except ArithmeticError:
        return different
