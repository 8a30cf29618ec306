"""``bouquet ledger``: what a node's data has cost, for its operator."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.config.node import STATE_DIRECTORY, NodeConfig, witness_of
from common.privacy import accounting, ledger
from common.privacy.ledger import Book
from deploy.settings import Commands

SHORT = 12


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "ledger",
        help="show, verify or export what this node's data has cost",
        description="Example: bouquet ledger show --node /etc/bouquet/ward-1/node.toml",
    )
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("--node", type=Path, help="the node's config (its kit's node.toml), which names both places")
    parser.add_argument("--directory", type=Path, default=STATE_DIRECTORY, help="or the node's state-directory")
    parser.add_argument("--witness", type=Path, help="and its privacy-witness (default: DIRECTORY.witness/head)")
    parser.set_defaults(work=_work)


def _work(options: Namespace) -> int:
    directory, witness = options.directory, options.witness or witness_of(options.directory)
    if options.node:
        node = NodeConfig.read(options.node)
        directory, witness = node.ledger, node.witness
    return ACTIONS[options.action](ledger.existing(directory, witness))


def show(book: Book) -> int:
    """Every release, and under them what the node has spent, and each data set that has a budget of its own."""
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
    for entry in book.entries:
        facts = (entry.number, entry.time, _short(entry.dataset), entry.node, entry.run, entry.round, entry.rule)
        cost = (f"{entry.noise_multiplier:.4g}", f"{entry.sample_rate:.4g}", entry.steps, f"{entry.epsilon:.4g}")
        table.add_row(*map(str, (*facts, entry.mechanism, *cost)))
    # Wide enough for every column, whatever the terminal or the pipe says.
    console = Console(width=160, highlight=False, soft_wrap=True)
    console.print(table)
    totals = {f"data set {_short(name)}": book.counting(dataset) for name, dataset in book.datasets.items()}
    for name, spent in ({"node": book.entries} | totals).items():
        if spent:
            newest = spent[-1]
            total = accounting.epsilon([entry.release for entry in spent], newest.delta, newest.accountant)
            console.print(f"{name}: epsilon {total:.4g} at delta {newest.delta:g}", markup=False)
    return 0


def verify(book: Book) -> int:
    """Say that the chain holds; reading it has proved that."""
    print(f"{len(book.entries)} releases, none changed or missing; the last digest is {book.head.digest or 'none'}")
    return 0


def export(book: Book) -> int:
    """Every release as a line of JSON."""
    for entry in book.entries:
        print(entry.to_json())
    return 0


def _short(fingerprint: str) -> str:
    fields, _, digest = fingerprint.rpartition(":")
    return f"{fields}:{digest[:SHORT]}" if fields else digest[:SHORT]


ACTIONS = {"show": show, "verify": verify, "export": export}
