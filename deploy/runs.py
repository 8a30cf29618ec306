"""``bouquet runs`` and ``bouquet report``: what run directories say."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common import record, report, units
from common.error import BouquetError
from common.page import NOTHING
from common.record import METRICS, Run, number, printable
from deploy.settings import Commands

LOCAL = Path("runs")
COLOURS = {"running": "cyan", "finished": "green", "broken off": "yellow"}
# As wide as it takes where nobody's terminal says otherwise.
WIDTH = 160


def add_to(commands: Commands) -> None:
    """Add the subcommands."""
    listing = commands.add_parser(
        "runs",
        help="list the runs in a folder",
        description="Example: bouquet runs; bouquet runs /srv/bouquet/runs. The run that was written to last is last.",
    )
    where = "where run directories are (default: runs, or else ~/.bouquet/runs)"
    listing.add_argument("folder", nargs="?", type=Path, help=where)
    listing.set_defaults(work=lambda options: show(options.folder or default_folder()))
    remake = commands.add_parser(
        "report",
        help="remake the report of a run",
        description="Example: bouquet report runs/flu. Every run ends with one; this is for a run that is under way, "
        "was killed, or is older.",
    )
    remake.add_argument("runs", nargs="+", type=Path, metavar="run", help="a run directory")
    remake.set_defaults(work=_report)


def default_folder() -> Path:
    """Where ``bouquet run`` has left runs, or where ``flwr run`` does."""
    return LOCAL if LOCAL.is_dir() else record.DEFAULT_DIRECTORY


def find(folder: Path) -> list[Path]:
    """The run directories in a folder. Raises :class:`BouquetError` where there is no such folder."""
    if not folder.is_dir():
        raise BouquetError(
            "there is no folder of runs",
            where=str(folder),
            cure="Name the one that --directory or run-directory named, or start a run with bouquet run.",
        )
    return record.find(folder)


def show(folder: Path) -> int:
    """Print a line a run."""
    found = find(folder)
    if not found:
        print(f"no run in {folder}; bouquet run starts one")
        return 0
    console = console_of_width()
    console.print(table([Run.read(run) for run in found]))
    return 0


def console_of_width() -> Console:
    """A console as wide as the terminal, or as the table where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def table(runs: Sequence[Run]) -> Table:
    """Name, rule, rounds, score, bytes, planned epsilon, state, and when a run was last written to."""
    lines = Table("run", "rule")
    for title in ("rounds", "score", "up", "down", "epsilon"):
        lines.add_column(title, justify="right")
    lines.add_column("state")
    lines.add_column("last written", justify="right")
    for run in runs:
        score = f"{run.metric} {units.figure(run.scores[max(run.scores)])}" if run.scores else NOTHING
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((run.folder / METRICS).stat().st_mtime))
        crossed = run.tally.crossed
        lines.add_row(
            *(Text(printable(run.name)), Text(printable(str(run.config.get("rule.name", NOTHING))))),
            *(f"{run.done}/{run.rounds}", Text(score), units.size(crossed["up"]), units.size(crossed["down"])),
            *(_planned(run), Text(run.state, style=COLOURS[run.state]), written),
        )
    return lines


def _planned(run: Run) -> str:
    """What the run was to cost a node; its report says what it has cost."""
    if not run.private:
        return NOTHING
    if noise := number(run.config, "privacy.noise-multiplier"):
        return f"noise {noise:g}"
    return f"≤ {number(run.config, 'privacy.epsilon') or 0:g}"


def _report(options: argparse.Namespace) -> int:
    for run in options.runs:
        print(report.write(run))
    return 0
