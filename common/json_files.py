"""JSON that a kill, a full disk or another release may have damaged: what cannot be read counts as absent."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Values = TypeVar("Values", bound="DataclassInstance")
Object = Mapping[str, Any]

# Lines that are parsed in one call.
READ_TOGETHER = 1000


def read_object(file: Path) -> Object:
    """The JSON object in a file; empty where there is none, or one that was torn."""
    try:
        return mapping(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def read_lines(file: Path) -> Iterator[Object | None]:
    """The JSON object of each line, None for a line that is not a whole one. Of a file that is not there, nothing."""
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        while some := list(islice(lines, READ_TOGETHER)):
            yield from (line if isinstance(line, dict) else None for line in _parsed(some))


def is_torn(file: int) -> bool:
    """Whether the last line of a file of lines, open for reading as the descriptor ``file``, lacks its end."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def written(values: "DataclassInstance") -> dict[str, Any]:
    """A dataclass as a JSON object; what is None is not written."""
    return {name: value for name, value in asdict(values).items() if value is not None}


def filled(kind: type[Values], facts: Object) -> Values:
    """A dataclass from a JSON object that this release need not have written.

    What is missing, or of another type than the field's, is nothing: None where that is allowed, or else 0, False or
    empty. What the dataclass does not know is passed over.
    """
    return kind(**{name: read(facts.get(name)) for name, read in _readers(kind).items()})


def mapping(value: object) -> Object:
    """A JSON object; empty where it is something else."""
    return value if isinstance(value, dict) else {}


def number(facts: Object, key: str) -> float | None:
    """The finite number under ``key``; None where there is none."""
    return _figure(facts.get(key))


def _figure(value: Any) -> float | None:
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _figures(value: object) -> dict[str, float]:
    found = {name: _figure(each) for name, each in mapping(value).items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def _texts(value: object) -> dict[str, str]:
    return {name: str(each) for name, each in mapping(value).items()}


_READERS: Mapping[object, Callable[[Any], object]] = {
    bool: lambda value: value is True,
    int: lambda value: int(_figure(value) or 0),
    float: lambda value: _figure(value) or 0.0,
    float | None: _figure,
    str: lambda value: value if isinstance(value, str) else "",
    str | None: lambda value: value if isinstance(value, str) else None,
    tuple[str, ...]: lambda value: tuple(map(str, value if isinstance(value, list) else ())),
    Object: mapping,
    Mapping[str, str]: _texts,
    Mapping[str, int]: lambda value: {name: int(figure) for name, figure in _figures(value).items()},
    Mapping[str, float]: _figures,
    Mapping[str, float] | None: lambda value: _figures(value) or None,
    Mapping[str, Mapping[str, float]] | None: lambda value: (
        {name: _figures(each) for name, each in mapping(value).items()} or None
    ),
}
"""How a field of each type is read."""


@cache
def _readers(kind: type) -> Mapping[str, Callable[[Any], object]]:
    """How each field of a dataclass is read; one that is a dataclass itself is filled likewise."""
    hints = get_type_hints(kind)

    def nested(inner: Any) -> Callable[[Any], object]:
        return lambda value: filled(inner, mapping(value))

    return {
        field.name: nested(hint) if is_dataclass(hint := hints[field.name]) else _READERS[hint]
        for field in fields(kind)
        if field.init
    }


def _parsed(lines: Sequence[str]) -> list[Any]:
    """The JSON of each line, None for one that is not whole.

    Together, they are read faster and have their keys in common; that fails where one is torn.
    """
    try:
        together = json.loads(f"[{','.join(lines)}]")
    except json.JSONDecodeError:
        together = []
    return together if len(together) == len(lines) else [_one(line) for line in lines]


def _one(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
