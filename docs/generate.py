"""What is written down twice is written by this: ``python -m docs.generate``; with ``--check`` it is only looked at.

The defaults of the run config in ``pyproject.toml`` come from the code that reads them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from common.config.run import RunConfig
from strategies.registries import defaults

ROOT = Path(__file__).parents[1]
ORDER = (
    *("", "model", "lora", "adapter", "init", "task", "data", "rule", "mean", "server-optimizer", "merge", "train"),
    *("optimizer", "objective", "gradient", "keep", "privacy", "wire", "evaluation", "round", "checkpoint"),
    *("tracking", "metrics"),
)
"""The sections of the run config, as a reader meets them."""


def section(key: str) -> str:
    """The section of a key of the run config; empty for one of none."""
    return key.rpartition(".")[0].split(".")[0]


def config() -> Iterator[str]:
    """Every key of the run config with its default, as TOML."""
    flat = RunConfig().to_flower() | defaults()
    for key, value in sorted(flat.items(), key=lambda item: ORDER.index(section(item[0]))):
        yield f"{key} = {json.dumps(value)}"


def between(text: str, start: str, end: str, body: str) -> str:
    """``text`` with what stands between two markers replaced; the markers stay."""
    before, found, rest = text.partition(start)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"no {start!r} with {end!r} after it")
    return f"{before}{start}{body}{end}{after}"


def files() -> Iterator[tuple[Path, str]]:
    """Each file that has generated parts, and what it should hold."""
    pyproject = ROOT / "pyproject.toml"
    body = "\n".join(config()) + "\n"
    yield pyproject, between(pyproject.read_text(), "[tool.flwr.app.config]\n", "\n[tool.ruff]", body)


def main(check: bool) -> int:
    """Write the files, or say which are stale."""
    stale = [(file, text) for file, text in files() if file.read_text() != text]
    for file, text in stale:
        if not check:
            file.write_text(text)
        print(f"{'stale' if check else 'written'}: {file.relative_to(ROOT)}", file=sys.stderr)
    if check and stale:
        print("run `make generate`", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
