"""One attempt at a run: its directory, held by this command alone, and its exit code."""

import fcntl
import random
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.task import TaskConfig
from common.error import BouquetError
from common.record.directory import ADAPTER, make_folder, name_of_now

FLOWERS_LOG = "flower.log"
# The exit codes of a run, beside 0 for one that went as it was asked.
FAILED, TOO_FEW_NODES = 1, 3


@dataclass(frozen=True)
class Attempt:
    """The directory of a run to come, and its config with what follows from that."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def log(self) -> Path:
        """The file of what Flower and the nodes say, and nobody has to read while all goes well."""
        return self.folder / FLOWERS_LOG

    def tell_next(self) -> None:
        """Say what the run that has ended is good for."""
        if (self.folder / ADAPTER).is_dir():
            from common.tasks import TASKS  # with torch, which takes seconds to import

            task, folder = TASKS[self.config.get("task.name", TaskConfig().name)], shlex.quote(str(self.folder))
            answers = task.language or task.sequence_classification
            print(
                f"next: bouquet {f'chat {folder}' if answers else f'export {folder} --to exports/{self.folder.name}'}"
            )

    def tell_failed(self, reason: str, *, too_few: bool) -> int:
        """Say why the run did not complete; its exit code."""
        said = f"The full log is in {self.log}."
        print(f"bouquet: the run did not complete: {reason}\n{said}", file=sys.stderr)
        return TOO_FEW_NODES if too_few else FAILED


@contextmanager
def attempted(nodes: int, directory: Path, config: Mapping[str, Any]) -> Iterator[Attempt]:
    """Make a run's directory in ``directory`` and hold it.

    Raises :class:`BouquetError` where another command does, where another run is, and where the disk does not take it.
    """
    name = str(config.get("run-name") or name_of_now(random.SystemRandom().randrange(10**6)))
    make_folder(folder := directory / name, resume=bool(config.get("resume")))
    whole = {"min-nodes": nodes, **config, "run-directory": str(directory), "run-name": name}
    attempt = Attempt(folder, whole)
    with _alone(attempt.log):
        yield attempt


@contextmanager
def _alone(log: Path) -> Iterator[None]:
    """Hold a run's log, from before there is a record that could be held. Raises :class:`BouquetError` if another does.

    No child process inherits the lock: Flower leaves one behind.
    """
    with log.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            cure = "Wait for it or stop it, or choose another run-name."
            raise BouquetError("this run is under way", where=str(log.parent), cure=cure) from error
        yield
