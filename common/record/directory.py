"""A run directory: its files, and whether a process writes them."""

import fcntl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from common import durable
from common.error import BouquetError
from common.json_files import filled, read_object

DEFAULT_DIRECTORY = Path.home() / ".bouquet" / "runs"
CONFIG, METRICS, SUMMARY, SAID, CHECKPOINTS = "config.json", "metrics.jsonl", "summary.json", "run.log", "checkpoints"
ADAPTER = "adapter"

AS_ASKED, TOO_FEW, BROKEN_OFF = "as asked", "too few nodes", "broken off"
"""How a run has ended, in its summary and in the event that says why it was stopped."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``config.json``: the name by which the nodes know the ``run``, its whole config, and what it runs."""

    run: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    code: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the run directory ``folder``; empty where there are none."""
        return filled(cls, read_object(folder / CONFIG))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``summary.json``: what a run that is finished came to.

    ``rounds`` is the round whose model it has left, and ``adapter_digest`` is of that model's tensors. ``before`` and
    ``after`` are the held-out ``metric`` by node, and over all nodes under ``all``; None where there is none.
    """

    rounds: int
    ended: str
    bytes_up: int
    bytes_down: int
    failures: Mapping[str, int]
    late: Mapping[str, int]
    peak_memory: float
    adapter: str
    adapter_digest: str
    metric: str | None = None
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Of the run directory ``folder``; None where there is none, or a torn one."""
        facts = read_object(folder / SUMMARY)
        return filled(cls, facts) if facts else None


def name_of_now(number: int) -> str:
    """The name of a run that was given none: the time, and the end of a ``number`` of its own."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{number % 10**6:06d}"


def make_folder(folder: Path, *, resume: bool) -> None:
    """The directory of a run to come.

    Raises :class:`BouquetError` where another run is, unless it is resumed, and where the disk does not take it.
    """
    if (folder / CHECKPOINTS).is_dir() and not resume:
        raise BouquetError(
            "a run with this name already exists",
            where=str(folder),
            cure="Choose another run-name, or set resume = true to continue it.",
        )
    cure = "Choose another run-directory (bouquet run --directory) or run-name."
    with durable.writing("a run directory", folder, cure):
        folder.mkdir(parents=True, exist_ok=True)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


def is_running(folder: Path) -> bool:
    """Whether a process writes a run directory: its metrics are locked by another opening of the file."""
    with (folder / METRICS).open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def find(folder: Path) -> list[Path]:
    """The run directories in a folder, the one that was written to last at the end."""
    return sorted((run for run in folder.iterdir() if is_run(run)), key=lambda run: (run / METRICS).stat().st_mtime)
