"""The processes of a node's tasks, forked from one that has imported what they need.

A Python that starts anew takes seconds to import Flower, and Flower starts one for every message. The process that is
forked from has one thread, no connection and no bundle: it waits on a pipe for the command of a task, and ends when its
SuperExec does.
"""

import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SOURCE, TASK = "bouquet-forks", "bouquet-task"
"""What ``ps -o comm`` calls the process that is forked from, and those that are forked."""


@dataclass
class Forks:
    """Stands where a module has ``subprocess``, and has the processes of one ``program`` forked.

    ``pipe`` leads to the process that they are forked from. All others, and these too where that process is gone, are
    started as they would be.
    """

    pipe: int
    program: str
    subprocess: ModuleType

    def __getattr__(self, name: str) -> Any:
        return getattr(self.subprocess, name)

    def Popen(self, command: Sequence[str], **options: Any) -> Any:  # noqa: N802 (the name of what it stands for)
        """Have the process forked; started anew, it is returned as well."""
        if command[0] == self.program and not options:
            try:
                os.write(self.pipe, json.dumps(command).encode() + b"\n")
                return None
            except BrokenPipeError:
                pass
        return self.subprocess.Popen(command, **options)


def part() -> tuple[int, list[str]]:
    """Fork the process that tasks are forked from, after everything is imported and before anything is started.

    Returns the pipe to it here, and in each process that is forked over it the command of its task.
    """
    reading, writing = os.pipe()
    if os.fork():
        os.close(reading)
        return writing, []
    os.close(writing)
    _be_called(SOURCE)
    # It goes when the pipe is closed; whoever interrupts the terminal means its tasks.
    own = {signal.SIGINT: signal.SIG_IGN, signal.SIGCHLD: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    with os.fdopen(reading, "rb") as commands:
        for command in commands:
            if os.fork() == 0:
                for number, handler in before.items():
                    signal.signal(number, handler)
                _be_called(TASK)
                np.random.seed()  # Python's own generator does it by itself
                return -1, json.loads(command)
    os._exit(0)


def _be_called(name: str) -> None:
    with suppress(OSError):  # Linux alone has it
        Path("/proc/self/comm").write_text(name)
