"""Errors for users: what is wrong, where, what was expected, what was found, and what to do."""

import difflib
import re
from collections.abc import Iterable


class BouquetError(Exception):
    """Something that a user, a file or another machine got wrong, as opposed to a defect of ours.

    The message reads ``what (where): expected E, got G. cure``; parts that are left out are left out of it. ``what``
    never holds a piece of data: of a node's errors it alone travels. ``wrong`` is the message without ``cure``.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", cure: str = "") -> None:
        self.what = what
        where, expected, got = map(on_one_line, (where, expected, got))
        facts = [f"expected {expected}" if expected else "", f"got {got}" if got else ""]
        message = what + (f" ({where})" if where else "")
        if detail := ", ".join(filter(None, facts)):
            message += f": {detail}"
        self.wrong, self.cure = message, cure
        super().__init__(f"{message}. {cure}".rstrip() if cure else message)


class RefusalError(BouquetError):
    """What a node declines for good: its budget is spent, or its policy forbids it.

    The text leaves the machine, from a private run too, so it may hold facts of configs but none of the data.
    """


class QuorumError(BouquetError):
    """Too few nodes are left to go on: what has been finished stands, and the run can be resumed."""


class DiskError(BouquetError):
    """What a disk does not take, or give back: what has been finished stands, and goes on once the disk is mended."""


def on_one_line(text: str) -> str:
    """A text that another machine may have a hand in, without what ends a line or moves a cursor: as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def brief(value: object, most: int = 80) -> str:
    """A few characters of what another machine has sent, whatever it is."""
    if isinstance(value, str):
        return value[:most]
    return str(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``Did you mean 'x'?`` for the closest of ``known``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The mistake of a key that no config has."""
    return f"{key}: unknown key. {did_you_mean(key, known)}".rstrip()


def unknown_choice(key: str, got: object, names: Iterable[str]) -> str:
    """The mistake of a value that is not among ``names``."""
    names = list(names)
    return f"{key}: expected one of {', '.join(names)}, got {got!r}. {did_you_mean(str(got), names)}".rstrip()
