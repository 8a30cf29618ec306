"""Which cells of a matrix of tests `make test` runs, and which only `make test-all`."""

from collections.abc import Callable, Container, Hashable, Iterable
from typing import Any

import pytest

from strategies import RULES


def each(cells: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """The cells as parameters of one test, or tuples of several; those that are not ``quick`` are exhaustive."""
    return [cell if cell in quick else _exhaustive(cell) for cell in cells]


def _exhaustive(cell: Any) -> Any:
    return pytest.param(*(cell if isinstance(cell, tuple) else (cell,)), marks=pytest.mark.exhaustive)


def first_of_each(cells: Iterable[str], kind: Callable[[str], Hashable]) -> list[str]:
    """One cell of each kind."""
    found: dict[Hashable, str] = {}
    for cell in cells:
        found.setdefault(kind(cell), cell)
    return list(found.values())


def each_rule(fits: Callable[[Any], bool] = lambda rule: True) -> list[Any]:
    """The rules that fit; quick is the first of those that extend one contract: a mean, a core, a stack, or a rule."""
    names = [name for name, rule in RULES.items() if fits(rule)]
    return each(names, first_of_each(names, lambda name: RULES[name].__base__))
