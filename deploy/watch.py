"""`bouquet watch`: a run as it goes, from its directory alone; or a node of this machine, from its state directory."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common import readable
from common.config import node
from common.config.node import NodeConfig
from common.error import BouquetError
from common.readable import printable
from common.record import steps
from common.record.directory import METRICS, is_running
from common.record.events import Asked, Evaluate, Failure, Train
from common.record.run import Run
from deploy import runs
from deploy.runs import COLOURS
from deploy.settings import Commands
from server_app.report.page import NOTHING

PAUSE_SECONDS = 1.0
MOST_NODES, MOST_FAILURES = 24, 3
BARS = "▁▂▃▄▅▆▇█"
SPARK = 24
E = TypeVar("E", Train, Evaluate)


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "watch",
        help="follow a run in the terminal",
        description="Example: bouquet watch; bouquet watch runs/flu. It reads the run directory, and how far nodes of "
        "this machine are in their round, waits while a run is interrupted until it is resumed, and ends with the run "
        "or with Ctrl-C. On a node's machine: bouquet watch --node node.toml.",
    )
    parser.add_argument("run", nargs="?", type=Path, help="a run directory (default: the newest run)")
    parser.add_argument("--node", type=Path, help="instead of a run, a node of this machine: its kit's node.toml")
    parser.add_argument("--once", action="store_true", help="print one frame and exit, as without a terminal")
    parser.set_defaults(work=_watch)


def _watch(options: argparse.Namespace) -> int:
    console = runs.console_of_width()
    once = options.once or not console.is_terminal
    if options.node:
        own = NodeConfig.read(options.node)
        if once:
            console.print(node_frame(own, time.time()))
            return 0
        with suppress(KeyboardInterrupt):
            follow_node(own, console)
        return 0
    folder = options.run or _newest()
    if once:
        console.print(frame(Run.read(folder), time.time()))
        return 0
    try:
        follow(folder, console)
    except KeyboardInterrupt:
        console.print(f"bouquet watch {folder} continues watching; the run is not affected", markup=False)
    return 0


def follow_node(own: NodeConfig, console: Console) -> NoReturn:
    """Show how far a node of this machine is, whatever the run, until it is interrupted."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(node_frame(own, time.time()), refresh=True)
            time.sleep(PAUSE_SECONDS)


def node_frame(own: NodeConfig, now: float) -> RenderableType:
    """One picture of a node of this machine, at the time ``now`` (seconds since the epoch)."""
    said = [
        f"{each.run}, round {each.round}: {each}, {readable.duration(max(0.0, now - each.at))} ago"
        for each in steps.under_way(own.state)
        if each.node == own.label
    ]
    return Text(printable("\n".join([own.label, *(said or ["not training"])])))


def follow(folder: Path, console: Console) -> None:
    """Show the run until it is finished."""
    run, read_at = Run.read(folder), -1.0
    with Live(console=console, auto_refresh=False) as live:
        while True:
            # A long record is read again only when there is more of it, or when its writer has come or gone.
            written = (folder / METRICS).stat().st_mtime
            if written != read_at or not run.running:
                run, read_at = Run.read(folder), written
            elif not is_running(folder):
                run = Run.read(folder)
            live.update(frame(run, time.time()), refresh=True)
            if run.state == "finished":
                return
            time.sleep(PAUSE_SECONDS)


def frame(run: Run, now: float) -> RenderableType:
    """One picture of a run, at the time ``now`` (seconds since the epoch)."""
    parts: list[RenderableType] = [_heading(run), _progress(run, now), _figures(run)]
    if run.nodes:
        parts.append(_nodes(run))
    failures = run.all(Failure)
    parts += [_failure(event) for event in failures[-MOST_FAILURES:]]
    if len(failures) > MOST_FAILURES:
        parts.append(Text(f"  and {len(failures) - MOST_FAILURES} earlier failures", style="dim"))
    return Group(*parts)


def _newest() -> Path:
    folder = runs.default_folder()
    if found := runs.find(folder):
        return found[-1]
    raise BouquetError("there is no run to watch", where=str(folder), cure="Start one with bouquet run, or name one.")


def _heading(run: Run) -> Text:
    config = run.config
    text = Text(printable(run.name), style="bold")
    text.append(f"  {run.state}", style=COLOURS[run.state])
    text.append(printable(f"  {config.get('rule.name', NOTHING)}, {config.get('model.name', NOTHING)}"), style="dim")
    if run.state == "broken off":
        reason = run.stopped.reason if run.stopped else "No reason was recorded."
        text.append(printable(f"\n{reason}"), style="yellow")
        text.append("\nresume=true with the same run-name resumes after the last round.", style="dim")
    return text


def _progress(run: Run, now: float) -> Table:
    """Rounds done, and the time left."""
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(1, run.rounds), completed=min(run.done, run.rounds), width=40)
    line.add_row(f"round {run.done}/{run.rounds}", bar, _left(run, now))
    return line


def _left(run: Run, now: float) -> str:
    if not run.running:
        return f"{readable.duration(run.seconds)} in all"
    if not run.marks:
        return "waiting for nodes"
    if run.pace is None:
        return "the time left is known after the first round"
    idle = now - (run.folder / METRICS).stat().st_mtime
    since = run.events[-1].elapsed - run.marks[-1] + max(0.0, idle)
    left = max(0.0, run.pace * (run.rounds - run.done) - since)
    return f"{readable.duration(run.pace)} per round, about {readable.duration(left)} left"


def _figures(run: Run) -> Table:
    """Loss and score with their course, and bytes."""
    line = Table.grid(padding=(0, 3))
    cells = []
    for name, history in (("loss", run.losses), (run.metric, run.scores)):
        if history:
            cells.append(f"{name} {readable.figure(history[max(history)])} {spark(history)}")
    if run.private and not cells:
        cells.append("private: no figure leaves a node")
    crossed = [f"{way} {readable.size(run.tally.crossed[way])}" for way in ("up", "down")]
    line.add_row(*cells, *crossed)
    return line


def _nodes(run: Run) -> Table:
    """A line a node: what it is doing, and its last figures."""
    table = Table("node", "now")
    for title in ("round", "loss", run.metric or "score", "training", "up", "failures"):
        table.add_column(title, justify="right")
    doing, failed = dict(_doing(run)), run.tally.failures
    trained, evaluated = run.by_node(Train), run.by_node(Evaluate)
    for name in run.nodes[:MOST_NODES]:
        last, scored = _last(trained.get(name, {})), _last(evaluated.get(name, {}))
        table.add_row(
            *(Text(printable(name)), doing.get(name, NOTHING), str(last.round) if last else NOTHING),
            _told(last, lambda event: event.loss, readable.figure),
            _told(scored, lambda event: event.score, readable.figure),
            _told(last, lambda event: event.seconds, readable.duration),
            _told(last, lambda event: event.bytes_up, readable.size),
            str(failed[name]),
        )
    if len(run.nodes) > MOST_NODES:
        table.add_row(f"and {len(run.nodes) - MOST_NODES} more", *[""] * 7)
    return table


def _doing(run: Run) -> Iterator[tuple[str, str]]:
    """What each node of the last round does: all that was asked after it, in order; of this machine's, how far."""
    if not run.running:
        return
    asked = max((index for index, event in enumerate(run.events) if isinstance(event, Asked)), default=len(run.events))
    for event in run.events[asked:]:
        if isinstance(event, Asked):
            own = {each.node: str(each) for each in steps.under_way(node.STATE_DIRECTORY, run.settings.run)}
            yield from ((asked, own.get(asked, "training")) for asked in event.nodes)
        elif isinstance(event, Train):
            yield event.node, "sent"
        elif isinstance(event, Failure):
            yield event.node, "failed"


def _failure(event: Failure) -> Text:
    """A failure in one line."""
    reason = printable(event.reason or NOTHING).strip().split("\n")[0]
    text = Text("  failed: ", style="yellow", no_wrap=True, overflow="ellipsis")
    text.append(printable(f"{event.node or NOTHING}, {event.during or NOTHING} {event.round}: {reason}"))
    return text


def _last(events: Mapping[int, E]) -> E | None:
    return events[max(events)] if events else None


def _told(event: E | None, figure: Callable[[E], float | None], write: Callable[[float], str]) -> str:
    value = None if event is None else figure(event)
    return NOTHING if value is None else write(value)


def spark(history: Mapping[int, float]) -> str:
    """The course of a figure in a few blocks: the last ``SPARK`` rounds."""
    values = [value for _, value in sorted(history.items())][-SPARK:]
    low, span = min(values), max(values) - min(values)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in values)
