"""``bouquet runs`` and ``bouquet report``: what run directories say."""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common import readable
from common.error import BouquetError
from common.json_files import number
from common.readable import printable
from common.record import directory
from common.record.directory import METRICS
from common.record.run import Run
from deploy.settings import Commands
from server_app import report
from server_app.report.page import NOTHING

LOCAL = Path("runs")
COLOURS = {"running": "cyan", "finished": "green", "broken off": "yellow"}
# As wide as it takes where nobody's terminal says otherwise.
WIDTH = 160
SECONDS_A_DAY = 86_400


def add_to(commands: Commands) -> None:
    """Add the subcommands."""
    listing = commands.add_parser(
        "runs",
        help="list the runs in a folder",
        description="Example: bouquet runs; bouquet runs /srv/bouquet/runs. The most recently written run comes last.",
    )
    where = "where run directories are (default: runs, or else ~/.bouquet/runs)"
    listing.add_argument("folder", nargs="?", type=Path, help=where)
    old = "delete runs last written to more than DAYS ago, except those under way"
    listing.add_argument("--prune", type=float, metavar="DAYS", help=old)
    listing.set_defaults(work=_runs)
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
    return LOCAL if LOCAL.is_dir() else directory.DEFAULT_DIRECTORY


def find(folder: Path) -> list[Path]:
    """The run directories in a folder. Raises :class:`BouquetError` where there is no such folder."""
    if not folder.is_dir():
        raise BouquetError(
            "there is no folder of runs",
            where=str(folder),
            cure="Name the folder given as --directory or run-directory, or start a run with bouquet run.",
        )
    return directory.find(folder)


def prune(folder: Path, days: float) -> list[Path]:
    """Delete the runs that were last written to more than ``days`` ago and are not under way; returns their folders.

    A link to a run stays, and so does what it leads to. Raises :class:`BouquetError` for an age that is none, and
    where a run cannot be deleted.
    """
    if not days >= 0:
        raise BouquetError("an impossible age", where="--prune", expected="0 days or more", got=f"{days:g}")
    limit = time.time() - days * SECONDS_A_DAY
    old = [
        run for run in find(folder) if written(run) < limit and not run.is_symlink() and not directory.is_running(run)
    ]
    for run in old:
        try:
            shutil.rmtree(run)
        except OSError as error:
            cure = "Do it as the user that owns the runs."
            raise BouquetError("a run cannot be deleted", where=str(run), got=str(error), cure=cure) from error
    return old


def written(run: Path) -> float:
    """When a run directory was last written to, in seconds since 1970."""
    return (run / METRICS).stat().st_mtime


def _runs(options: argparse.Namespace) -> int:
    folder = options.folder or default_folder()
    if options.prune is None:
        return show(folder)
    for run in prune(folder, options.prune):
        print(f"deleted {run}")
    return 0


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
        score = f"{run.metric} {readable.figure(run.scores[max(run.scores)])}" if run.scores else NOTHING
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(written(run.folder)))
        crossed = run.tally.crossed
        lines.add_row(
            *(Text(printable(run.name)), Text(printable(str(run.config.get("rule.name", NOTHING))))),
            *(f"{run.done}/{run.rounds}", Text(score), readable.size(crossed["up"]), readable.size(crossed["down"])),
            *(_planned(run), Text(run.state, style=COLOURS[run.state]), last),
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
