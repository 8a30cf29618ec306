"""The command line of `bouquet config`: the resolved config of a run, and its keys explained."""

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence

from common.config.renamed import RENAMED, told
from common.error import BouquetError, did_you_mean
from deploy import settings
from deploy.config import catalogue
from strategies import AXES, Recipe

EXAMPLE = """Examples:

bouquet config profiles/private.toml lora.rank=4      every key with its value in that run
bouquet config --explain train.steps                  what a key means, and its range
bouquet config --explain mean                         the same for a section; without a name, for all

Without --explain the output is TOML, which `bouquet run` can read.
"""


def add_to(commands: settings.Commands) -> None:
    """Add the subcommand."""
    parser = settings.add_command(
        commands, "config", help="show the settings of a run, and explain them", example=EXAMPLE
    )
    parser.add_argument("settings", nargs="*", help="key=value or a TOML file of such keys")
    parser.add_argument(
        "--explain", nargs="?", const="", metavar="KEY", help="a key or a section; without a name, all of them"
    )
    parser.set_defaults(work=work)


def work(options: argparse.Namespace) -> int:
    """Print what was asked for. Raises :class:`BouquetError` on an unknown key, and on mistakes in the settings."""
    lines = resolved(options.settings) if options.explain is None else explained(options.explain)
    for line in lines:
        print(line)
    return 0


def resolved(given: Sequence[str]) -> Iterator[str]:
    """Every key with its value, as TOML; a comment has the default where that is another."""
    config = Recipe.read(settings.read(given)).config.to_flower()
    for entry in catalogue.run_entries():
        value = config[entry.key]
        mark = f"  # default {json.dumps(entry.default)}" if value != entry.default else ""
        yield f"{entry.key} = {json.dumps(value)}{mark}"


def explained(name: str) -> Iterator[str]:
    """The entries of a key, of a section or of a method; of all where ``name`` is empty."""
    run, node = catalogue.run_entries(), catalogue.node_entries()
    names = RENAMED.get(name, (name,))
    found = [
        (entry, whose)
        for whose, entries in (("", run), ("    (of a node, in --node-config)", node))
        for entry in entries
        if not name or entry.key in names or entry.key.startswith(f"{name}.")
    ]
    if not found:
        known = [*(entry.key for entry in (*run, *node)), *catalogue.sections(), *RENAMED]
        cure = did_you_mean(name, known) or "bouquet config --explain lists all keys."
        raise BouquetError("there is no such key", got=name, cure=cure)
    if name in RENAMED:
        yield told(name)
    for entry, whose in found:
        yield f"{entry.key} = {json.dumps(entry.default)}{whose}"
        yield from _indented(entry.meaning)
        yield from _indented(f"Expected: {entry.range}.")
    for axis in AXES:
        if name in (axis.section, f"{axis.section}.name"):
            yield from (f"    {member.name:14}{catalogue.summary(member)} {member.paper}" for member in axis.values())


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")
