"""Flower's SuperNode with shorter waits, for the Flower whose waits are known.

Its loop sleeps three seconds whenever no message is there, and looks for a task's reply every half second: in a short
round that is more than all else.
"""

import sys
import time
from importlib import import_module

from deploy.flower import replace

KNOWN = "1.39.0"
LOOP = "flwr.supernode.start_client_internal"
"""The module with the waits; of ``time`` it has ``sleep`` alone."""
IDLE_SECONDS = 3.0
LOOK_SECONDS = 0.05
LEAST_SECONDS, SHARE = 0.2, 0.1


class Waits:
    """What that loop has in the place of ``time``.

    A message is looked for often after a reply, and the more seldom the longer none has come: what a node adds to its
    wait is a tenth of it, or a fifth of a second, and a node that is idle asks as seldom as Flower's.
    """

    def __init__(self) -> None:
        self._idle = 0.0

    def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds``, or less."""
        if seconds < IDLE_SECONDS:  # for what a task of this machine is about to say
            self._idle = 0.0
            time.sleep(min(seconds, LOOK_SECONDS))
            return
        pause = min(seconds, max(LEAST_SECONDS, SHARE * self._idle))
        self._idle += pause
        time.sleep(pause)


def start() -> None:
    """``flower-supernode``; with Flower's own waits, and a line that says so, where they are not known."""
    from flwr import __version__

    if __version__ == KNOWN:
        replace(LOOP, "time", lambda _: Waits())
    else:
        said = f"bouquet: the waits of Flower {__version__} are unknown (known: {KNOWN}) and are left unchanged"
        print(said, file=sys.stderr, flush=True)
    import_module("flwr.supernode.cli.flower_supernode").flower_supernode()
