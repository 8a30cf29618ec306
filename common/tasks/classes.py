"""The classes of a run, and what a label says in whatever form a file has it."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from common.config.run import TaskConfig
from common.error import BouquetError

LARGEST = 10**18
"""A label beyond is a word, whatever it is."""


class Classes:
    """Those of ``task.classes``, or the whole numbers from 0 to ``task.labels`` - 1, true and false."""

    def __init__(self, config: TaskConfig) -> None:
        self._field = config.label
        self.names = config.names or [str(number) for number in range(config.labels)]
        numbers = {str(number): number for number in range(config.labels)} | {"false": 0, "true": 1}
        self._numbers = {label(name): number for number, name in enumerate(config.names)} or numbers
        told = ", ".join(f"{number}: {name}" for number, name in enumerate(config.names))
        self.facts: Mapping[str, str] = {"classes": told} if told else {}
        named = f"one of {', '.join(config.names)}"
        self._expected = named if config.names else f"a whole number from 0 to {config.labels - 1}"

    def number(self, said: str, got: Any) -> int:
        """The class that a label names. Raises :class:`BouquetError`, with what was ``got``, where it names none."""
        if (number := self._numbers.get(label(said), -1)) < 0:
            raise BouquetError(
                "a label is out of range",
                where=f"field '{self._field}'",
                expected=self._expected,
                got=repr(got)[:80],
                cure="Set task.classes to the labels in order, separated by commas, or task.labels to their number.",
            )
        return number


def label(said: str) -> str:
    """One text for all forms of a label that a file format gives it: 0, 0.0 and "0" are one, True and "true"."""
    said = said.strip()
    if said.casefold() in ("true", "false"):
        return said.casefold()
    try:
        number = Decimal(said)
        whole = abs(number) < LARGEST and number == int(number)
    except (ArithmeticError, ValueError):
        return said
    return str(int(number)) if whole else said
