"""Every key of the configs, with its default, its range and its meaning: from the fields that read it."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from common.config.node import NodeConfig
from common.config.ranges import Only
from common.config.run import RunConfig
from common.config.section import Section
from common.method import Method, Option, Range, Registry, listed
from strategies.registries import AXES, NAMES

ORDER = (
    *("", "model", "lora", "adapter", "init", "task", "data", "rule", "mean", "server-optimizer", "merge", "train"),
    *("optimizer", "objective", "gradient", "keep", "privacy", "wire", "evaluation", "round", "checkpoint"),
    *("tracking", "metrics"),
)
"""The sections of the run config, as a reader meets them; keys of no section come first."""

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Entry(NamedTuple):
    """One key of a config."""

    key: str
    default: Option
    range: str
    """What it may be, in words."""
    meaning: str

    @property
    def section(self) -> str:
        """What stands before the first dot; empty where there is none."""
        return self.key.split(".")[0] if "." in self.key else ""


def run_entries() -> list[Entry]:
    """The keys of the run config, section by section."""
    found = [*_of_section(RunConfig()), *(entry for axis in AXES for entry in _of_axis(axis))]
    return sorted(found, key=lambda entry: ORDER.index(entry.section))


def node_entries() -> list[Entry]:
    """The keys of the node config."""
    return list(_of_section(NodeConfig()))


def sections() -> dict[str, str]:
    """What each section of the run config is for, in the order of :data:`ORDER`."""
    about = {axis.section: axis.chooses for axis in AXES}
    for field, value in RunConfig():
        if isinstance(value, Section):
            about[_key(RunConfig, field)] = inspect.getdoc(type(value)) or ""
    return {section: about.get(section, "The run as a whole.") for section in ORDER}


def summary(member: type[Method]) -> str:
    """What a member of an axis does, in one line."""
    return (inspect.getdoc(member) or "").splitlines()[0]


def _of_section(section: Section, prefix: str = "") -> Iterator[Entry]:
    kind = type(section)
    for name, field in kind.model_fields.items():
        key, value = prefix + _key(kind, name), getattr(section, name)
        if isinstance(value, Section):
            yield from _of_section(value, f"{key}.")
        elif isinstance(value, Option):
            yield Entry(key, value, _range(key, field), _one_line(field.description or ""))


def _key(kind: type[Section], name: str) -> str:
    return kind.model_fields[name].alias or name


def _range(key: str, field: FieldInfo) -> str:
    """What a field of a section may be: by its names, its values, or its bounds, in this order."""
    if key in NAMES:
        return listed(NAMES[key])
    if get_origin(field.annotation) is Literal:
        return listed(get_args(field.annotation))
    only = [limit.expected for limit in field.metadata if isinstance(limit, Only)]
    bounds: dict[str, Any] = {}
    for limit in field.metadata:
        if isinstance(limit, Gt | Ge | Lt | Le):
            bounds |= _bound(limit)
    return ", ".join(only) or _words(field.annotation, Range(**bounds))


def _bound(limit: Gt | Ge | Lt | Le) -> dict[str, Any]:
    """A bound as pydantic has it, as :class:`Range` calls it."""
    name = type(limit).__name__.lower()
    return {name: getattr(limit, name)}


def _words(kind: Any, limits: Range) -> str:
    """What a value of a type may be within its limits; a whole number is said to be one."""
    said = str(limits)
    if kind is int and said and not limits.among:
        return f"{said}, whole"
    return said or KINDS[kind]


def _of_axis(axis: Registry[Any]) -> Iterator[Entry]:
    yield Entry(f"{axis.section}.name", axis.default, listed(axis.names), axis.chooses)
    for name, member in axis.items():
        ranges, meanings = member.ranges(), _meanings(member)
        for key, default in member.options().items():
            said = _words(type(default), ranges[key])
            yield Entry(f"{axis.section}.{name}.{key}", default, said, meanings[key.replace("-", "_")])


def _meanings(member: type[Method]) -> dict[str, str]:
    """The docstrings of a member's fields, those that it inherits among them."""
    found: dict[str, str] = {}
    for kind in reversed(member.__mro__):
        if issubclass(kind, Method):
            found |= _field_docstrings(kind)
    return found


@cache
def _field_docstrings(kind: type[Method]) -> dict[str, str]:
    """The text below each annotated field of a class, from its source: Python itself forgets it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    found: dict[str, str] = {}
    for field, text in pairwise(body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(said))),
            ):
                found[name] = _one_line(said)
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
