"""The steps of the nodes below a run's output, on a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from common.config import node
from common.record import steps

MOST_NODES = 8
REFRESHED = 2
"""Times a second."""


@contextmanager
def shown(run: str, console: Console | None = None) -> Iterator[None]:
    """While it lasts, a line for each node that trains in ``run`` stands under all that is printed.

    Where there is no terminal, nothing is added to what is printed.
    """
    console, since = console or Console(highlight=False), time.time()
    if not console.is_terminal:
        yield
        return
    with Live(
        get_renderable=lambda: lines(run, since),
        console=console,
        refresh_per_second=REFRESHED,
        transient=True,
        redirect_stderr=False,
    ):
        yield


def lines(run: str, since: float) -> Text:
    """How far each node is in the newest round that was written of after ``since``, in seconds since the epoch."""
    recent = [each for each in steps.under_way(node.STATE_DIRECTORY, run) if each.at >= since]
    newest = max((each.round for each in recent), default=0)
    training = [each for each in recent if each.round == newest]
    said = [f"  {each.node}, round {each.round}: {each}" for each in training[:MOST_NODES]]
    if len(training) > MOST_NODES:
        said.append(f"  and {len(training) - MOST_NODES} more")
    return Text("\n".join(said), style="dim", no_wrap=True, overflow="ellipsis")
