"""The other processes of a node with several devices: each has a device of its own, the whole model, and no say.

They are this process's children, for as long as it lives: for a message, or with ``warm`` for as long as the worker. It
alone speaks to the SuperNode, reads the data, draws samples and noise, and steps. In a round the children are told once
what is trained and on which examples; in a step each gets the trained values and the numbers of its examples, and what
all have computed is added up (:class:`client_app.group.Group`). So there is one optimizer, one objective and one
generator of noise, whatever the number of processes, and no state that has to be kept the same in several places.

Orders go over a pair of sockets that nobody else can open. Its end is how either side learns that the other is gone:
a child ends with its parent, whatever it is doing, and a child that has ended ends the round.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save

from client_app.crossing import packed
from client_app.group import Group
from client_app.link import receive, send
from client_app.shares import Processes, Share, Sums, Work
from client_app.training import Turn
from common.adapter.values import State
from common.error import BouquetError
from common.tasks import Example
from common.version import ROOT

LOAD, BEGIN, STEP, DONE = b"load", b"begin", b"step", b"done"
"""What a child is told; and what it says when it has started, met the others, or done as it was told."""


class Children(Processes, AbstractContextManager["Children"]):
    """The process itself, on the first of ``devices``, with a child on each of the others.

    After any error they are gone. Raises :class:`BouquetError` where one does not start, or has ended.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices, self.number = tuple(devices), len(devices)
        self._links: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        with tempfile.TemporaryDirectory(prefix="bouquet-") as folder, self._whole():
            store = Path(folder) / "store"
            for rank, device in enumerate(devices[1:], 1):
                self._start(device, rank, store)
            self._wait()
            self._group = Group(store, 0, self.number)
            # The others may still be looking into the store for each other.
            self._wait()

    @property
    def alive(self) -> bool:
        """Whether all of them are there."""
        return bool(self._links) and all(process.poll() is None for process in self._processes)

    def load(self, run_config: Mapping[str, Any], attention: str = "auto", compile: bool = False) -> None:
        """Let every child have the model of a run, as its config describes it, on its device, computed so."""
        order = {"run": dict(run_config), "node": {"attention": attention, "compile": compile}}
        with self._whole():
            self._tell(LOAD, json.dumps(order).encode())
            self._wait()

    def begin(self, state: State, turn: Turn, units: Sequence[Sequence[Example]]) -> None:
        """Let every child begin a round: with the whole adapter of ``state``, over these ``units``, or one of all."""
        trained = {"number": turn.number, "keys": list(map(str, turn.keys)), "blocks": list(turn.blocks)}
        order = {"scale": state.scale, "turn": trained | {"seed": turn.seed}}
        tensors = {str(key): tensor.contiguous() for key, tensor in (state.adapter | state.offset).items()}
        with self._whole():
            self._tell(BEGIN, json.dumps(order).encode(), save(tensors), packed(units))
            self._wait()

    def add_up(self, work: Work, shares: Sequence[Share]) -> Sums:
        with self._whole():
            for link, share in zip(self._links, shares[1:], strict=True):
                send(link, STEP)
                send(link, json.dumps(share).encode())
            self._group.spread(work.parameters)
            own = work.compute(shares[0])
            # Before gloo waits for them: one that has ended on its share is told from one that is slow.
            self._wait()
            return self._group.add_up(work.parameters, own)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.wait()
        for link in self._links:
            link.close()
        self._links.clear()
        self._processes.clear()

    def _start(self, device: str, rank: int, store: Path) -> None:
        link, other = socket.socketpair()
        self._links.append(link)
        place = [device, str(rank), str(self.number), str(store)]
        with other:
            process = subprocess.Popen(
                [sys.executable, "-m", "client_app.child", str(other.fileno()), *place],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        self._processes.append(process)

    def _tell(self, *frames: bytes) -> None:
        for link in self._links:
            for frame in frames:
                send(link, frame)

    def _wait(self) -> None:
        for link in self._links:
            receive(link)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """End them all where anything goes wrong: who is in the middle of one order cannot be given the next."""
        try:
            yield
        except ConnectionError as error:
            self.close()
            raise BouquetError(
                "another process of this node ended before it answered",
                where=f"device = {','.join(self.devices)}",
                cure="Read the node's log. If it gives no reason, memory ran out: see bouquet doctor node.",
            ) from error
        except BaseException:
            self.close()
            raise


_children: Children | None = None


def on(devices: Sequence[str]) -> Children:
    """The children of this process on these devices: those that it has, or new ones."""
    global _children
    if _children is None or _children.devices != tuple(devices) or not _children.alive:
        if _children is not None:
            _children.close()
        _children = Children(devices)
    return _children
