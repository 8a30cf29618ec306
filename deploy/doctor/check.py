"""A list of checks, each one line on the terminal: what was found, or what is wrong and what to do."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from common.error import BouquetError


class WarningError(BouquetError):
    """Something to mend soon; the machine is fit for now."""


class Check(NamedTuple):
    """``work`` returns what it found, or raises :class:`BouquetError`."""

    name: str
    work: Callable[[], str]


def examine(checks: Iterable[Check]) -> bool:
    """Run every check, whatever the others say; True if none has failed."""
    fit = True
    for name, work in checks:
        try:
            verdict, said = "ok", work()
        except WarningError as error:
            verdict, said = "warn", str(error)
        except BouquetError as error:
            verdict, said, fit = "FAIL", str(error), False
        print(f"{verdict:4}  {name:12}  {' '.join(said.split())}", flush=True)
    return fit
