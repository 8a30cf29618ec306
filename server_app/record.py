"""The record of a run: its directory, a line of JSON for each event, and what a person reads while it runs.

``common/record/run.py`` reads what is written here.
"""

import fcntl
import json
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from common import durable
from common.config.run import RunConfig
from common.error import BouquetError, DiskError, QuorumError
from common.json_files import is_torn, written
from common.readable import printable
from common.record.directory import (
    ADAPTER,
    BROKEN_OFF,
    CHECKPOINTS,
    CONFIG,
    DEFAULT_DIRECTORY,
    METRICS,
    SAID,
    SUMMARY,
    TOO_FEW,
    Settings,
    Summary,
    make_folder,
    name_of_now,
)
from common.record.event import Event, OfNode
from common.record.events import Failure, Late, Opened, Stopped, to_line
from common.record.run import Tally, read_events
from common.stamp import utc_now
from common.version import fingerprint
from server_app import listeners, report
from server_app.costs import round_seconds

LOCK_ATTEMPTS, LOCK_PAUSE = 5, 0.1
VERSIONS = ("flwr", "torch", "transformers", "peft", "bitsandbytes")
# Lines about single nodes, of one kind in one round, that a person still reads.
FEW = 3
CONTINUED = "\n        | "


class Record:
    """One run directory: its config, metrics and log, checkpoints, adapter and report.

    While it is open its metrics are locked: that a run is under way is known by the lock, which ends with its process.
    All figures of a run pass through :meth:`event`; trackers and the exporter listen to it and have no other source;
    ``tally`` is what they add up to.
    Raises :class:`BouquetError` where the directory will not do, or a listener does not start.
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
        self.folder = parent / (config.run_name or name_of_now(run_id))
        make_folder(self.folder, resume=config.resume)
        self._started = time.monotonic()
        self.tally = Tally()
        self._told: Counter[tuple[str, int]] = Counter()
        self._reasons: set[str] = set()
        self._files: list[TextIOWrapper] = []
        try:
            with durable.writing("the record of a run", self.folder):
                self._open(config, run_id)
            self._listeners = listeners.started(config, self.folder)
            self.event(Opened(round=0, time=utc_now()))
        except BouquetError:
            _close(self._files)
            raise

    def _open(self, config: RunConfig, run_id: int) -> None:
        """Make the files that a run writes from its first moment on."""
        self._files.append(_appended(self.folder / METRICS))
        for event in read_events(self.folder)[0]:
            self.tally.hear(event)
        versions = {"python": platform.python_version()} | {package: version(package) for package in VERSIONS}
        settings = Settings(
            run=config.run_name or str(run_id), config=config.to_flower(), versions=versions, code=fingerprint()
        )
        durable.write(self.folder / CONFIG, json.dumps(written(settings), indent=2) + "\n")
        # What a run that is resumed came to is not known yet.
        (self.folder / SUMMARY).unlink(missing_ok=True)
        self._files.append((self.folder / SAID).open("a"))
        files = (None, self._files[-1])
        self._consoles = [Console(file=file, width=110, highlight=False, soft_wrap=True) for file in files]

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter that the run leaves."""
        return self.folder / ADAPTER

    def event(self, event: Event) -> None:
        """Append a line to ``metrics.jsonl``, at once. Raises :class:`DiskError` where the disk does not take it."""
        event = replace(event, elapsed=round_seconds(time.monotonic() - self._started))
        try:
            with durable.writing("the record of a run", self.folder / METRICS):
                metrics = self._files[0]
                metrics.write(to_line(event) + "\n")
                metrics.flush()
        finally:  # whoever listens hears of the end of a run that a full disk has ended
            self._tell(event)

    def _tell(self, event: Event) -> None:
        self.tally.hear(event)
        for listener in list(self._listeners):
            try:
                listener.hear(event)
            except Exception as error:  # a run is worth more than its charts, whatever their service raises
                self._listeners.remove(listener)
                self.say(f"    {listener.name} receives no more figures of this run: {error}")

    def note(self, event: OfNode, said: str) -> bool:
        """Something about one node: an event always, and a line for the first few of its kind in a round.

        True if the line was said.
        """
        self.event(event)
        kind = event.during if isinstance(event, Failure | Late) else event.phase, event.round
        self._told[kind] += 1
        if self._told[kind] <= FEW:
            # What a node wrote stands apart, so that no line of it passes for one of the run's.
            self.say(CONTINUED.join(f"    {event.node} {said}".splitlines()))
        elif self._told[kind] == FEW + 1:
            self.say("    and others; metrics.jsonl has them all")
        return self._told[kind] <= FEW

    def failure(self, phase: str, round: int, node: str, reason: str) -> None:
        """A node that could not do its part, and why: in full the first time, later by its first line."""
        told = reason.partition("\n")[0] if reason in self._reasons else reason
        failure = Failure(round=round, node=node, during=phase, reason=reason)
        if self.note(failure, f"left out of {phase}: {told}"):
            self._reasons.add(reason)

    def say(self, text: str) -> None:
        """One line for whoever follows the run; what a node wrote in it steers no terminal."""
        self._print(printable(text), markup=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A small table; the first column is text, the others are figures."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._print(table)

    def _print(self, shown: str | Table, **options: Any) -> None:
        with durable.writing("the log of a run", self.folder / SAID):
            for console in self._consoles:
                console.print(shown, **options)

    def summarise(self, summary: Summary) -> None:
        """Write ``summary.json``: what the run came to."""
        with durable.writing("the summary of a run", self.folder / SUMMARY):
            durable.write(self.folder / SUMMARY, json.dumps(written(summary), indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close the record and leave the report, however the run has ended."""
        with suppress(DiskError):  # a disk that has ended the run has said so
            if error is not None:
                ended = TOO_FEW if isinstance(error, QuorumError) else BROKEN_OFF
                self.event(Stopped(round=0, ended=ended, reason=str(error) or type(error).__name__))
        _close(self._files[:1])  # the report finds no run under way
        for listener in self._listeners:
            with suppress(DiskError):
                try:
                    listener.close()
                except Exception as fault:  # see above
                    self.say(f"    {listener.name} did not receive the run's last figures: {fault}")
        with suppress(DiskError):
            try:
                self.say(f"report: {report.write(self.folder)}")
            except DiskError as fault:
                self.say(str(fault))
        _close(self._files)


def few(names: Collection[str]) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(sorted(names)[:FEW])
    return f"{shown} and {len(names) - FEW} more" if len(names) > FEW else shown


def _appended(file: Path) -> TextIOWrapper:
    """A file of lines, locked, open at its end; a line that a kill has torn is ended first.

    Raises :class:`BouquetError` where another process writes it.
    """
    opened = file.open("a+")
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
    if is_torn(opened.fileno()):
        opened.write("\n")
    return opened


def _close(files: Iterable[TextIOWrapper]) -> None:
    for file in files:
        with suppress(OSError):  # lines that the disk has not taken
            file.close()
