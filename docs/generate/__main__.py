"""``python -m docs.generate`` writes what is generated; with ``--check`` it only says what is stale."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from docs.generate.methods import methods
from docs.generate.pyproject import pyproject
from docs.generate.readme import readme
from docs.generate.reference import reference
from docs.generate.tree import ROOT

TARGETS: Mapping[str, Callable[[str], str]] = {
    "pyproject.toml": pyproject,
    "README.md": readme,
    "docs/config.md": reference,
    "docs/methods.md": methods,
}
"""Each file that has generated parts, and what makes its text of the text that it has."""


def stale() -> Iterator[tuple[Path, str]]:
    """The files that are not what they should be, and what they should hold."""
    for name, written in TARGETS.items():
        file = ROOT / name
        text = file.read_text() if file.exists() else ""
        if text != (wanted := written(text)):
            yield file, wanted


def main(check: bool) -> int:
    """Write the files, or say which are stale."""
    found = list(stale())
    for file, text in found:
        if not check:
            file.write_text(text)
        print(f"{'stale' if check else 'written'}: {file.relative_to(ROOT)}", file=sys.stderr)
    if check and found:
        print("run `make generate`", file=sys.stderr)
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
