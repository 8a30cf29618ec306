"""The standard library of this machine as data: what a first run is trained on, without a download."""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# Families of standard library modules that every Python has had for years: what each node of the embedded data knows.
FAMILIES = {
    "concurrency": ("asyncio", "concurrent", "threading", "selectors"),
    "network": ("email", "http", "urllib", "socketserver"),
    "testing": ("unittest", "doctest", "pdb", "trace"),
    "formats": ("json", "csv", "xml", "zipfile", "tarfile"),
    "numbers": ("statistics", "fractions", "_pydecimal", "random", "datetime", "_pydatetime"),
    "language": ("inspect", "dataclasses", "functools", "collections", "argparse"),
}


@lru_cache(maxsize=1)
def records() -> Sequence[dict[str, Any]]:
    """Top-level functions and classes of the standard library on this machine, docstrings left out.

    Fields: ``family``, ``module``, ``text``. The base model was pretrained on docstrings, so that held-out text that
    still had them would be known to it.
    """
    return list(_records(Path(sysconfig.get_path("stdlib"))))


def _records(root: Path) -> Iterator[dict[str, Any]]:
    for family, modules in FAMILIES.items():
        for module in modules:
            package = root / module
            files = sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{module}.py"]
            for file in files:
                if file.exists() and "test" not in file.relative_to(root).parts:
                    for text in _definitions(file.read_text(encoding="utf-8")):
                        yield {"family": family, "module": file.relative_to(root).as_posix(), "text": text}


def _definitions(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    lines = source.splitlines()
    docstrings: set[int] = set()
    for node in _statements(tree):
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kept = [
                lines[number - 1]
                for number in range(node.lineno, (node.end_lineno or 0) + 1)
                if number not in docstrings
            ]
            yield "\n".join(kept) + "\n"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below ``node``; unlike ``ast.walk``, without the expressions, which are most of a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from _statements(child)
