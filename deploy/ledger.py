"""``bouquet ledger``: what a node's data has cost, for its operator."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from common import ledger
from common.ledger import Entry
from common.node_config import STATE_DIRECTORY
from deploy.settings import Commands

SHORT = 12


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "ledger",
        help="show, verify or export what this node's data has cost",
        description="Example: bouquet ledger show --directory /var/lib/bouquet",
    )
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("--directory", type=Path, default=STATE_DIRECTORY, help="the node's state-directory")
    parser.set_defaults(work=lambda options: ACTIONS[options.action](ledger.read(options.directory)))


def show(entries: list[Entry]) -> int:
    """Every release, and under them what each data set has cost so far."""
    table = Table()
    for column in (
        "",
        "time",
        "data set",
        "node",
        "run",
        "round",
        "rule",
        "mechanism",
        "noise",
        "rate",
        "steps",
        "epsilon",
    ):
        table.add_column(column, justify="right" if column in {"", "round", "noise", "rate", "steps"} else "left")
    for entry in entries:
        facts = (entry.number, entry.time, entry.dataset[:SHORT], entry.node, entry.run, entry.round + 1, entry.rule)
        cost = (f"{entry.noise_multiplier:.4g}", f"{entry.sample_rate:.4g}", entry.steps, f"{entry.epsilon:.4g}")
        table.add_row(*map(str, (*facts, entry.mechanism, *cost)))
    # Wide enough for every column, whatever the terminal or the pipe says.
    console = Console(width=160, highlight=False, soft_wrap=True)
    console.print(table)
    for dataset, newest in {entry.dataset: entry for entry in entries}.items():
        console.print(f"data set {dataset[:SHORT]}: epsilon {newest.epsilon:.4g} at delta {newest.delta:g}")
    return 0


def verify(entries: list[Entry]) -> int:
    """Say that the chain holds; reading it has proved that."""
    digest = entries[-1].digest if entries else "none"
    print(f"{len(entries)} releases, nothing changed or missing; the last digest is {digest}")
    return 0


def export(entries: list[Entry]) -> int:
    """Every release as a line of JSON."""
    for entry in entries:
        print(entry.to_json())
    return 0


ACTIONS = {"show": show, "verify": verify, "export": export}
