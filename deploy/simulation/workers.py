"""Processes that answer for nodes of a simulation, and stay from one run to the next."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Self

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from client_app.link import packed, receive, send, unpacked
from common.error import BouquetError
from deploy.flower import APP, SIMULATION, environment
from deploy.simulation.places import places

PAUSE_SECONDS = 0.1


@dataclass(frozen=True, eq=False)
class Errand:
    """A message to a node, whose context has its state; what is said over it goes to ``log``, and the reply back."""

    message: Message
    context: Context
    log: Path
    back: Callable[[Message], None]


class Workers:
    """As many processes as the machine has room for, each with a thread that hands it one errand after another.

    A node's errands go to the worker that has its examples, or to one that is idle. A worker that dies is replaced, and
    its errand answered by an error. Raises :class:`BouquetError` where there is no room for a single one.
    """

    def __init__(self, nodes: int, cpus: int, gpus: float) -> None:
        self._workers = [_Worker(seen) for seen in places(cpus, gpus)[:nodes]]
        self._errands: list[Errand] = []
        self._changed = Condition()
        self._open = True
        numbers = range(len(self._workers))
        self._threads = [Thread(target=self._serve, args=(number,), daemon=True) for number in numbers]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._open = False
            self._errands.clear()
            self._changed.notify_all()
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()

    def start(self, log: Path) -> None:
        """Start those that are missing before there is anything to do, since they import for seconds."""
        for worker in self._workers:
            worker.start(log)

    def take(self, errand: Errand) -> None:
        """Have an errand done, by whoever is free."""
        with self._changed:
            self._errands.append(errand)
            self._changed.notify_all()

    def drop(self) -> None:
        """Forget what is still to do, and end those that are at it."""
        with self._changed:
            self._errands.clear()
            # Again, where one was just about to be started.
            while busy := [worker for worker in self._workers if worker.busy]:
                for worker in busy:
                    worker.kill()
                self._changed.wait(PAUSE_SECONDS)

    def _serve(self, number: int) -> None:
        worker = self._workers[number]
        while (errand := self._next(number)) is not None:
            try:
                reply = worker.do(errand)
            except Exception as error:  # a boundary: whatever it is, the node has not answered
                reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, str(error)), reply_to=errand.message)
            with self._changed:
                worker.busy = False
                self._changed.notify_all()
            errand.back(reply)

    def _next(self, number: int) -> Errand | None:
        """The oldest errand of a node that is this worker's, or else of any; None when all is over."""
        with self._changed:
            while self._open and not self._errands:
                self._changed.wait()
            if not self._open:
                return None
            own = (errand for errand in self._errands if errand.context.node_id % len(self._workers) == number)
            errand = next(own, self._errands[0])
            self._errands.remove(errand)
            self._workers[number].busy = True
            return errand


class _Worker:
    """One of them: ``python -m deploy.simulation.worker``, started where it is missing."""

    def __init__(self, seen: Mapping[str, str]) -> None:
        self.busy = False
        self._seen = seen
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def start(self, log: Path) -> socket.socket:
        """Start the process, if there is none; the link to it."""
        if self._link is not None and self._process is not None and self._process.poll() is None:
            return self._link
        self.close()
        self._link, other = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(APP), os.environ.get("PYTHONPATH"))))
        with other, log.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.simulation.worker", str(other.fileno())],
                pass_fds=[other.fileno()],
                cwd=APP,
                env=environment(SIMULATION | {"PYTHONPATH": path, **self._seen}),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # a Ctrl-C is its starter's to handle
            )
        return self._link

    def do(self, errand: Errand) -> Message:
        """The reply to an errand. Raises :class:`BouquetError` where the process ends over it."""
        frames = os.fsencode(errand.log), *packed(errand.context, errand.message)
        link = self.start(errand.log)
        try:
            for frame in frames:
                send(link, frame)
            context, reply = unpacked(receive(link), receive(link))
        except ConnectionError as error:
            raise self._ended(errand.log) from error
        errand.context.state = context.state
        return reply

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Give the link to a process that has ended back."""
        if self._link is not None:
            self._link.close()

    def _ended(self, log: Path) -> BouquetError:
        code = self._process.wait() if self._process else None
        return BouquetError(
            "the node's process ended before it answered",
            where=str(log),
            got=f"exit code {code}",
            cure="Read the log. Exit code -9 alone means out of memory: run fewer nodes at once (--cpus, --gpus).",
        )
