"""A section of a flat config: how Flower's keys become a frozen model, and every mistake in them one message."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.error import BouquetError, unknown_key


class ConfigError(BouquetError):
    """Every mistake in a config, one a line."""

    def __init__(self, mistakes: list[str], where: str, cure: str) -> None:
        self.mistakes = mistakes
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n  ".join([f"{count} in the {where}:", *mistakes]) + f"\n{cure}")
        self.what = "a config with mistakes"


WORDS = {
    "model_type": "a table",
    "dict_type": "a table",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
}
"""What was expected, by pydantic's name of the mistake; else it says so well enough itself."""


class Section(BaseModel):
    """A strict, frozen table whose keys are written in kebab-case."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


S = TypeVar("S", bound=Section)


def validate(model: type[S], flat: Mapping[str, Any], mistakes: list[str], where: str, cure: str) -> S:
    """The model of a flat config. Raises :class:`ConfigError` with ``mistakes`` and every one found here."""
    try:
        settings = model.model_validate(_unflatten(flat))
    except ValidationError as error:
        default = model().model_dump(by_alias=True)
        known = [*default, *dict(flatten(default))]
        mistakes = mistakes + [_describe(dict(detail), known) for detail in error.errors()]
        raise ConfigError(mistakes, where, cure) from None
    if mistakes:
        raise ConfigError(mistakes, where, cure)
    return settings


def _describe(detail: dict[str, Any], known: list[str]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_key(key, known)
    if detail["type"] == "sequence_str":
        return f"{key}: expected a list, such as [{json.dumps(detail['input'])}], got {detail['input']!r}"
    expected = WORDS.get(detail["type"], detail["msg"].removeprefix("Input should be "))
    return f"{key}: expected {expected}, got {detail['input']!r}"


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            inner = table.setdefault(section, {})
            table = inner if isinstance(inner, dict) else {}
        table[name] = value
    return nested


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys and their values."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
