"""Progress of this machine's nodes within their rounds: a small file of each node's own, while it trains.

It is for whoever stands at the machine, and nothing of it is in a message or in the record of a run. Of a private round
it holds no figure that is counted from records (docs/privacy.md).
"""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from common import durable, owned, readable
from common.error import RefusalError
from common.json_files import filled, read_object, written

FOLDER = "steps"
"""In a state directory, the folder of all runs' files: ``steps/<run>/<node>.json``."""
PAUSE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A node has ``done`` so many of a round's ``total`` steps after so many ``seconds``.

    ``speed`` is in tokens a second, and None in a private round; ``at`` is when that was, in seconds since the epoch.
    """

    run: str
    node: str
    round: int
    done: int
    total: int
    seconds: float
    at: float
    speed: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the round's last step is done, at the pace of those before."""
        return self.seconds / max(1, self.done) * (self.total - self.done)

    def __str__(self) -> str:
        speed = [] if self.speed is None else [f"{self.speed:,.0f} tokens/s"]
        return ", ".join([f"step {self.done}/{self.total}", *speed, f"{readable.duration(self.left)} left"])


def under_way(state: Path, run: str = "") -> list[Steps]:
    """What the nodes of a state directory are at, in order of their names, in a ``run`` or in all of them."""
    found = [filled(Steps, read_object(file)) for file in sorted((state / FOLDER).glob("*/*.json"))]
    return [steps for steps in found if steps.total and run in ("", steps.run)]


class StepsFile:
    """Has one node's steps of one round in its file, about once a second; the file is gone once the round is over.

    A disk that does not take it costs nobody a round. ``counted`` is false where the tokens may not be written down.
    """

    def __init__(self, state: Path, run: str, node: str, round: int, *, counted: bool) -> None:
        self._folder = state / FOLDER / run
        self._file = self._folder / f"{node}.json"
        self._round = Steps(run=run, node=node, round=round, done=0, total=0, seconds=0.0, at=0.0)
        self._counted = counted

    def __enter__(self) -> Self:
        self._started = self._written = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
            self._folder.rmdir()  # unless another node is at it

    def tell(self, done: int, total: int, tokens: int) -> None:
        """So many of the steps are done, and in all of them so many tokens were read."""
        if (now := time.monotonic()) - self._written < PAUSE_SECONDS:
            return
        self._written, seconds = now, now - self._started
        speed = tokens / seconds if self._counted else None
        steps = replace(self._round, done=done, total=total, seconds=seconds, at=time.time(), speed=speed)
        with suppress(OSError, RefusalError):
            owned.make_folder(self._folder)
            durable.write(self._file, json.dumps(written(steps)), durable.PRIVATE, lasting=False)
