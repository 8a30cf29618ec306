"""What every axis of a recipe stands on: a frozen choice with its hyperparameters, and the list of the choices."""

from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

from common.error import BouquetError, unknown_choice, unknown_key

Option = bool | int | float | str
"""A hyperparameter, as Flower's flat run config carries it."""

AUTO = "auto"
"""The name that leaves a choice to the rule, or to the privacy mode."""


GIVEN = "given"


def given(default: Any) -> Any:
    """A field that another part of the config sets, and so no hyperparameter in the method's own section."""
    return field(default=default, metadata={GIVEN: True})


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One published choice on one axis; its annotated fields are its hyperparameters and its config section."""

    name: ClassVar[str]
    paper: ClassVar[str]
    section: ClassVar[str]
    """The axis, as the run config calls it."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The hyperparameters and their defaults, by the names that the config has for them."""
        own = [(field.name, field.default) for field in fields(cls) if GIVEN not in field.metadata]
        return {_kebab(name): default for name, default in own if isinstance(default, Option)}

    def _demand(self, field: str, valid: bool, expected: str) -> None:
        """Raise :class:`BouquetError` unless a hyperparameter is valid."""
        if not valid:
            where = f"{self.section}.{self.name}.{_kebab(field)}"
            raise BouquetError("a value out of range", where=where, expected=expected, got=str(getattr(self, field)))


M = TypeVar("M", bound=Method)


class Registry(Mapping[str, type[M]], Generic[M]):
    """The members of an axis by name. ``default`` is the one that a config starts with, or :data:`AUTO`."""

    def __init__(self, section: str, *members: type[M], default: str) -> None:
        self.section = section
        self.default = default
        self._members = {member.name: member for member in members}

    def __getitem__(self, name: str) -> type[M]:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def defaults(self) -> dict[str, Option]:
        """Every key of the axis's config section, and its default."""
        keys: dict[str, Option] = {f"{self.section}.name": self.default}
        for name, member in self.items():
            keys |= {f"{self.section}.{name}.{key}": default for key, default in member.options().items()}
        return keys

    def mistakes(self, flat: Mapping[str, Any]) -> list[str]:
        """What is wrong with the axis's section of a flat config; what other sections hold is passed over."""
        found, known = [], self.defaults()
        for key, value in flat.items():
            if not key.startswith(f"{self.section}."):
                continue
            if key not in known:
                found.append(unknown_key(key, known))
            elif not _is_like(value, known[key]):
                found.append(f"{key}: expected {_KINDS[type(known[key])]}, got {value!r}")
        name = flat.get(f"{self.section}.name", self.default)
        names = [*self, *([AUTO] if self.default == AUTO else [])]
        if name not in names:
            found.append(unknown_choice(f"{self.section}.name", name, names))
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
