"""The basis of every axis of a recipe: a frozen choice with its hyperparameters, and the list of the choices."""

import operator
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

from common.error import BouquetError, unknown_choice, unknown_key

Option = bool | int | float | str
"""A hyperparameter, as Flower's flat run config carries it."""

AUTO = "auto"
"""The name that leaves a choice to the rule, or to the privacy mode."""


GIVEN = "given"
RANGE = "range"


@dataclass(frozen=True)
class Range:
    """What a value may be: more than ``gt``, at least ``ge``, less than ``lt``, at most ``le``; or one ``among`` some.

    A value that is ``needed`` may be anything but nothing; the word says what it is.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    among: tuple[Option, ...] = ()
    needed: str = ""

    def __contains__(self, value: Any) -> bool:
        if self.among or self.needed:
            return value in self.among if self.among else bool(value)
        return all(holds(value, bound) for holds, _, bound in self._bounds())

    def __str__(self) -> str:
        """The range in words; empty where anything goes."""
        if self.among:
            return listed(self.among)
        if self.ge is not None and self.le is not None:
            return f"{_figure(self.ge)} to {_figure(self.le)}"
        return self.needed or ", ".join(words.format(_figure(bound)) for _, words, bound in self._bounds())

    def _bounds(self) -> Iterator[tuple[Callable[[Any, Any], bool], str, float]]:
        for limit, (holds, words) in _LIMITS.items():
            if (bound := getattr(self, limit)) is not None:
                yield holds, words, bound


_LIMITS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "gt": (operator.gt, "more than {}"),
    "ge": (operator.ge, "{} or more"),
    "lt": (operator.lt, "less than {}"),
    "le": (operator.le, "at most {}"),
}


def _figure(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def listed(choices: Sequence[object]) -> str:
    """``a, b or c``."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


T = TypeVar("T", bound=Option)


def option(default: T, **limits: Any) -> T:
    """A hyperparameter with its default, and its :class:`Range` by ``limits``."""
    declared: Any = field(default=default, metadata={RANGE: Range(**limits)})
    return declared  # type: ignore[no-any-return]


def given(default: T, **limits: Any) -> T:
    """A field that another part of the config sets, and so no hyperparameter in the method's own section."""
    declared: Any = field(default=default, metadata={GIVEN: True, RANGE: Range(**limits)})
    return declared  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One published choice on one axis; its annotated fields are its hyperparameters and its config section.

    Raises :class:`BouquetError` where one of them is out of the range that it declares.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    section: ClassVar[str]
    """The axis, as the run config calls it."""

    def __post_init__(self) -> None:
        for own in fields(self):
            limits, value = own.metadata.get(RANGE), getattr(self, own.name)
            if limits is not None and value not in limits:
                where = f"{self.section}.{self.name}.{_kebab(own.name)}"
                raise BouquetError("a value out of range", where=where, expected=str(limits), got=str(value))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The hyperparameters and their defaults, by the names that the config has for them."""
        own = [(field.name, field.default) for field in fields(cls) if GIVEN not in field.metadata]
        return {_kebab(name): default for name, default in own if isinstance(default, Option)}

    @classmethod
    def ranges(cls) -> dict[str, Range]:
        """What each of the hyperparameters may be."""
        ranges = {_kebab(field.name): field.metadata.get(RANGE, Range()) for field in fields(cls)}
        return {name: ranges[name] for name in cls.options()}


M = TypeVar("M", bound=Method)


class Registry(Mapping[str, type[M]], Generic[M]):
    """The members of an axis by name.

    ``default`` is the one that a config starts with, or :data:`AUTO`; ``chooses`` says what a member is chosen for.
    Raises :class:`BouquetError` where two have one name.
    """

    def __init__(self, section: str, *members: type[M], default: str, chooses: str) -> None:
        self.section = section
        self.default = default
        self.chooses = chooses
        self._members: dict[str, type[M]] = {}
        for member in members:
            if self._members.setdefault(member.name, member) is not member:
                raise BouquetError(
                    "two members with the same name",
                    where=f"{section}.name",
                    expected="a unique name for each",
                    got=f"'{member.name}' of {self._members[member.name].__qualname__} and of {member.__qualname__}",
                )

    def __getitem__(self, name: str) -> type[M]:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def names(self) -> list[str]:
        """What a config may choose from."""
        return [*self, *([AUTO] if self.default == AUTO else [])]

    def defaults(self) -> dict[str, Option]:
        """Every key of the axis's config section, and its default."""
        keys: dict[str, Option] = {f"{self.section}.name": self.default}
        for name, member in self.items():
            keys |= {f"{self.section}.{name}.{key}": default for key, default in member.options().items()}
        return keys

    def ranges(self) -> dict[str, Range]:
        """What the hyperparameters of all members may be, by their keys."""
        return {
            f"{self.section}.{name}.{key}": limits
            for name, member in self.items()
            for key, limits in member.ranges().items()
        }

    def mistakes(self, flat: Mapping[str, Any]) -> list[str]:
        """What is wrong with the axis's section of a flat config; what other sections hold is passed over."""
        found, known, ranges = [], self.defaults(), self.ranges()
        for key, value in flat.items():
            if not key.startswith(f"{self.section}."):
                continue
            if key not in known:
                found.append(unknown_key(key, known))
            elif not _is_like(value, known[key]):
                found.append(f"{key}: expected {_KINDS[type(known[key])]}, got {value!r}")
            elif value != known[key] and value not in ranges.get(key, Range()):
                found.append(f"{key}: expected {ranges[key]}, got {value!r}")
        name = flat.get(f"{self.section}.name", self.default)
        if name not in self.names:
            found.append(unknown_choice(f"{self.section}.name", name, self.names))
        return found

    def build(self, flat: Mapping[str, Any], name: str = "", **given: Any) -> M:
        """The member that a flat config names, or ``name``, with its hyperparameters and what else it is ``given``.

        Raises :class:`BouquetError` on a value out of range.
        """
        name = name or str(flat.get(f"{self.section}.name", self.default))
        member, prefix = self[name], f"{self.section}.{name}."
        own = {
            key.replace("-", "_"): type(default)(flat.get(prefix + key, default))
            for key, default in member.options().items()
        }
        return member(**own, **given)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _is_like(value: object, default: Option) -> bool:
    """Whether a value may stand where ``default`` stood; a whole number may stand for a float."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
