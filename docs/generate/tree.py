"""The README's tree: every folder and module with what its docstring begins with."""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.wire.codecs import CODECS
from strategies import AXES

ROOT = Path(__file__).parents[2]
WIDTH, COLUMN = 120, 34
"""Of a line, and where its text begins."""

FIRST = {
    "Makefile": "Set-up, checks and tests.",
    ".ci/run": "What CI runs.",
    "pyproject.toml": "The project, the defaults of a run, and the directions of imports.",
    "constraints.txt": "The versions that are installed.",
}
PACKAGES = ("bouquet", "common", "strategies", "client_app", "server_app", "deploy")
LAST = {
    "profiles/": "Ready-made run configs and comparisons.",
    "tests/": "Laws over every axis, oracles from the papers, published bugs as mutants, whole runs.",
    "benchmarks/": "The measured claims, each one command.",
    "docs/": "The documentation; generate/ writes what the code already says.",
}
PLAIN = {
    "images": "Dockerfiles of the coordinator and of a GPU node.",
    "templates": "Templates of the files that a site's machines get.",
}
"""Folders without modules."""


def tree() -> str:
    """The whole of it, indented as code."""
    lines = [*_lines(FIRST), *(line for name in PACKAGES for line in _folder(ROOT / name, 0)), *_lines(LAST)]
    return "\n".join(f"    {line}" for line in lines)


def _lines(named: dict[str, str]) -> Iterator[str]:
    return (f"{name:{COLUMN - 4}}{text}" for name, text in named.items())


def _folder(folder: Path, depth: int) -> Iterator[str]:
    package, inner = folder / "__init__.py", "    " * (depth + 1)
    yield _line(f"{folder.name}/", _headline(package) if package.exists() else PLAIN[folder.name], depth)
    members = [member for member in _members() if member.file.parent == folder]
    hidden = {package, *(member.file for member in members if member.alone)}
    for file in sorted({*folder.glob("*.py")} - hidden):
        yield _line(file.name, _headline(file), depth + 1)
    if members:
        names = f"members: {', '.join(member.name for member in members)}"
        yield from textwrap.wrap(
            names, WIDTH - 4, initial_indent=inner, subsequent_indent=inner, break_on_hyphens=False
        )
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (path / "__init__.py").exists() or path.name in PLAIN:
            yield from _folder(path, depth + 1)


def _line(name: str, text: str, depth: int) -> str:
    return f"{'    ' * depth + name:{COLUMN - 4}}{text}"


def _headline(file: Path) -> str:
    """A module's first sentence; where it is too long, what stands before its colon. Raises ValueError beyond that."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    whole = re.split(r"\.\s", docstring.partition("\n")[0])[0].rstrip(".").replace("``", "`")
    for text in (whole, whole.partition(": ")[0]):
        if 0 < len(text) <= WIDTH - COLUMN:
            return f"{text}."
    raise ValueError(f"{file.relative_to(ROOT)}: its first sentence is longer than {WIDTH - COLUMN} characters")


class Member(NamedTuple):
    """A member of an axis, and the file that it is in: ``alone``, or with the axis's contract."""

    name: str
    file: Path
    alone: bool


@cache
def _members() -> list[Member]:
    found = []
    for axis in (*AXES, CODECS):
        for name, kind in axis.items():
            contract = next(base for base in kind.__mro__ if "section" in vars(base))
            file = Path(sys.modules[kind.__module__].__file__ or "").resolve()
            found.append(Member(name, file, kind.__module__ != contract.__module__))
    return found
