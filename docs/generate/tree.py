"""The README's tree: every folder and module with what its docstring begins with."""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from common.method import Method
from common.wire.codec import CODECS
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
    "profiles/": "Run configs, and comparisons, that come along.",
    "tests/": "Laws over every axis, oracles from the papers, published bugs as mutants, whole runs.",
    "benchmarks/": "The measured claims, each one command.",
    "docs/": "What there is to read; generate/ writes what the code knows better.",
}
PLAIN = {
    "images": "Dockerfiles of the coordinator and of a GPU node.",
    "templates": "What a site's machines are given, to be filled in.",
}
"""Folders without modules."""


def tree() -> str:
    """The whole of it, indented as code."""
    lines = [*_lines(FIRST), *(line for name in PACKAGES for line in _folder(ROOT / name, 0)), *_lines(LAST)]
    return "\n".join(f"    {line}" for line in lines)


def _lines(named: dict[str, str]) -> Iterator[str]:
    return (f"{name:{COLUMN - 4}}{text}" for name, text in named.items())


def _folder(folder: Path, depth: int) -> Iterator[str]:
    package = folder / "__init__.py"
    yield _line(f"{folder.name}/", _headline(package) if package.exists() else PLAIN[folder.name], depth)
    members = [name for name, file in _members().items() if file.parent == folder]
    for file in sorted(folder.glob("*.py")):
        if file != package and file not in _members().values():
            yield _line(file.name, _headline(file), depth + 1)
    indent = "    " * (depth + 1)
    yield from textwrap.wrap(
        f"members: {', '.join(members)}" if members else "",
        WIDTH - 4,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"):
        if (inner / "__init__.py").exists() or inner.name in PLAIN:
            yield from _folder(inner, depth + 1)


def _line(name: str, text: str, depth: int) -> str:
    return f"{'    ' * depth + name:{COLUMN - 4}}{text}"


def _headline(file: Path) -> str:
    """The first sentence of a module; where that is too long what stands before its colon. Raises ValueError beyond."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    whole = re.split(r"\.\s", docstring.partition("\n")[0])[0].rstrip(".").replace("``", "`")
    for text in (whole, whole.partition(": ")[0]):
        if 0 < len(text) <= WIDTH - COLUMN:
            return f"{text}."
    raise ValueError(f"{file.relative_to(ROOT)}: its first sentence is longer than {WIDTH - COLUMN} characters")


@cache
def _members() -> dict[str, Path]:
    """The members of every axis by name, and their files; those of a contract's own file are left out."""
    found: dict[str, Path] = {}
    for axis in (*AXES, CODECS):
        for name, member in axis.items():
            contract = next(kind for kind in member.__mro__ if "section" in vars(kind) and kind is not Method)
            if member.__module__ != contract.__module__:
                found[name] = Path(sys.modules[member.__module__].__file__ or "").resolve()
    return found
