"""The ``bouquet`` command.

bouquet run                                           the main job: four simulated nodes on this machine
bouquet run --nodes 2 num-server-rounds=1 rule.name=fedex-lora
bouquet check data.source=tickets.csv task.name=classify    what it would read and learn, before it starts
bouquet config --explain train.steps                  what a setting means, and what it may be
bouquet site create hospitals --address fl.example.org --nodes ward-1 ward-2
bouquet bundle                                        the digest of this release, which nodes allow
bouquet doctor node /etc/bouquet/ward-1 model.name=/models/llama-3.2-1b
bouquet plan --records 5000,1200 privacy.mode=example train.weighting=uniform
bouquet audit profiles/private.toml                   try to break that promise, with your own data
bouquet ledger show                                   what this node's data has cost
bouquet compare sst2 --data /data/sst2/train.jsonl    every rule of a profile, side by side
bouquet runs                                          the runs so far
bouquet watch                                         the newest run, while it runs
bouquet report runs/flu                               remake a run's report.html
bouquet export runs/flu --to exports/flu              the adapter as others load it, checked
bouquet chat runs/flu                                 try it in the terminal
bouquet serve exports/flu exports/colds               several adapters on one OpenAI-compatible address
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from common.error import BouquetError
from deploy.settings import Commands

# Where each subcommand is. Only the one that is asked for is imported: most know models, which takes seconds.
HOMES = {
    "run": "deploy.simulation.command",
    "check": "deploy.check",
    "config": "deploy.config.command",
    "rules": "deploy.command",
    "site": "deploy.site.commands",
    "bundle": "deploy.bundles.command",
    "doctor": "deploy.doctor.commands",
    "plan": "deploy.plan",
    "audit": "deploy.audit.command",
    "ledger": "deploy.ledger",
    "compare": "deploy.compare.command",
    "runs": "deploy.runs",
    "report": "deploy.runs",
    "watch": "deploy.watch",
    "export": "deploy.export.command",
    "chat": "deploy.chat.command",
    "serve": "deploy.serve.command",
}

VERSION = "--version"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 2 where the user has something to mend first, 130 if interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    # A scheduler's SIGTERM is a Ctrl-C: either way what this command started is stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = _parsed(parser(given[0] if given else ""), given)  # what is imported here takes seconds
        code: int = options.work(options)
    except BouquetError as error:
        print(f"bouquet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bouquet: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read it has read enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parsed(whole: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """The arguments; settings may stand on both sides of an option, which argparse alone does not take."""
    options, rest = whole.parse_known_args(given)
    if rest and (not hasattr(options, "settings") or any(setting.startswith("-") for setting in rest)):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.settings = [*options.settings, *rest]
    return options


def parser(wanted: str = "") -> argparse.ArgumentParser:
    """What is understood on the command line; a subcommand's function is its ``work``.

    With the ``wanted`` subcommand alone, if there is one of that name.
    """
    whole = argparse.ArgumentParser(
        prog="bouquet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument(VERSION, action="version", version=f"bouquet {version('bouquet')}")
    commands = whole.add_subparsers(dest="command", required=True)
    homes = [] if wanted == VERSION else [HOMES[wanted]] if wanted in HOMES else HOMES.values()
    for home in dict.fromkeys(homes):
        import_module(home).add_to(commands)
    return whole


def add_to(commands: Commands) -> None:
    """Add the one subcommand that is at home here."""
    rules = commands.add_parser("rules", help="list the aggregation rules", description="Example: bouquet rules")
    rules.set_defaults(work=_rules)


EXAMPLE = (4096, 16, 10)
"""The width of a square layer, the rank, and the nodes, by which the table tells bytes: the most of five rounds."""


def rules_table() -> str:
    """Every rule and its properties, as a Markdown table; bytes are those of :data:`EXAMPLE`."""
    from common import readable
    from common.adapter.spec import Spec
    from common.adapter.values import LayerShape
    from strategies import RULES, Recipe  # see above
    from strategies.cost import planned_bytes

    yes = {True: "yes", False: "no"}
    titles = ("rule", "exact", "linear", "mixed ranks", "privacy", "rate", "bytes up", "bytes down", "paper")
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, rule in RULES.items():
        width, rank, nodes = EXAMPLE
        recipe = Recipe.around(built := rule())
        example = [] if built.structure.trained <= built.structure.loose else ["example"]
        privacy = ", ".join([*example, "local", *(["central"] if rule.linear else [])])
        up, down = planned_bytes(recipe, Spec({"": LayerShape(width, width)}, {}, rank, 1.0), nodes)
        costs = (f"{built.rate:g}", readable.size(up), readable.size(down))
        facts = (f"`{name}`", yes[built.exact], yes[rule.linear], yes[rule.mixed_ranks], privacy, *costs, rule.paper)
        rows.append(f"| {' | '.join(facts)} |")
    return "\n".join(rows)


def _rules(_: argparse.Namespace) -> int:
    print(rules_table())
    return 0
