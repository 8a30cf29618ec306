"""The record of a run: its directory, a line of JSON for each event, and what a person reads while it runs.

``common/record.py`` reads what is written here.
"""

import fcntl
import json
import platform
import resource
import time
from collections.abc import Mapping
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from common import report
from common.config import RunConfig
from common.error import BouquetError
from common.record import CONFIG, DEFAULT_DIRECTORY, METRICS, SUMMARY
from common.version import fingerprint

LOCK_ATTEMPTS, LOCK_PAUSE = 5, 0.1
VERSIONS = ("flwr", "torch", "transformers", "peft", "bitsandbytes")


class Record:
    """One run directory: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``adapter/``, ``report.html``.

    While it is open its metrics are locked: that a run is under way is known by the lock, which ends with its process.
    """

    def __init__(self, config: RunConfig, run_id: int) -> None:
        parent = Path(config.run_directory or DEFAULT_DIRECTORY).expanduser()
        if not parent.is_absolute():
            raise BouquetError(
                "the run directory is not absolute",
                where="run-directory",
                expected="an absolute path",
                got=str(parent),
                cure="An app does not run in the folder it was started from.",
            )
        name = config.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id % 10**6:06d}"
        self.folder = parent / name
        if self.checkpoints.is_dir() and not config.resume:
            raise BouquetError(
                "there is a run of this name already",
                where=str(self.folder),
                cure="Choose another run-name, or set resume = true to continue it.",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        self._metrics: TextIOWrapper = _appended(self.folder / METRICS)
        versions = {"python": platform.python_version()} | {package: version(package) for package in VERSIONS}
        settings = {
            "run": config.run_name or str(run_id),  # the name by which the nodes know it
            "config": config.to_flower(),
            "versions": versions,
            "code": fingerprint(),
        }
        (self.folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        # What a run that is gone on with came to is not known yet.
        (self.folder / SUMMARY).unlink(missing_ok=True)
        self.event("opened", 0, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self._console = Console(width=110, highlight=False, soft_wrap=True)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter that the run leaves."""
        return self.folder / "adapter"

    def event(self, phase: str, round: int, **facts: Any) -> None:
        """Append one line to ``metrics.jsonl``, at once."""
        line = {"phase": phase, "round": round, "elapsed": round_seconds(time.monotonic() - self._started), **facts}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def failure(self, phase: str, round: int, node: str, reason: str) -> None:
        """A node that could not do its part, and why."""
        self.event("failure", round, node=node, during=phase, reason=reason)
        self.say(f"    {node} left out of {phase}: {reason}")

    def say(self, text: str) -> None:
        """One line for whoever follows the run."""
        self._console.print(text, markup=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A small table; the first column is text, the others are figures."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``: what the run came to."""
        (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close the record and leave the report, however the run has ended."""
        if error is not None:
            self.event("stopped", 0, reason=str(error) or type(error).__name__)
        self._metrics.close()
        try:
            self.say(f"report: {report.write(self.folder)}")
        except OSError as fault:
            self.say(f"the report cannot be written: {fault}; bouquet report {self.folder} makes it later")


def _appended(file: Path) -> TextIOWrapper:
    """A file of lines, locked, open at its end; a line that a kill has torn is ended first.

    Raises :class:`BouquetError` where another process writes it.
    """
    torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    opened = file.open("a")
    # Whoever looks whether the run is under way holds the lock for a moment.
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if attempt == LOCK_ATTEMPTS - 1:
                opened.close()
                raise BouquetError(
                    "this run is under way",
                    where=str(file.parent),
                    cure="Wait for it or stop it (flwr list, flwr stop), or choose another run-name.",
                ) from error
            time.sleep(LOCK_PAUSE)
    if torn:
        opened.write("\n")
    return opened


class Stopwatch:
    """The seconds of each phase of a round, and of all together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """End ``phase``, which began where the one before it ended."""
        now = time.monotonic()
        self.seconds[phase] = round_seconds(now - self._last)
        self._last = now

    @property
    def total(self) -> float:
        """All phases that have ended."""
        return sum(self.seconds.values())


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def round_seconds(seconds: float) -> float:
    """Seconds to the millisecond."""
    return float(f"{seconds:.3f}")
