"""The ``bouquet`` command.

bouquet run                                           the main job: four simulated nodes on this machine
bouquet run --nodes 2 num-server-rounds=1 rule.name=fedex-lora
bouquet site create hospitals --address fl.example.org --nodes ward-1 ward-2
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
import signal
import sys
from collections.abc import Sequence

from common.error import BouquetError
from deploy import ledger, plan, runs, simulation, watch
from deploy.audit import command as audit
from deploy.chat import command as chat
from deploy.compare import command as compare
from deploy.doctor import commands as doctor
from deploy.export import command as export
from deploy.serve import command as serve
from deploy.site import commands as site
from strategies import RULES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 2 where the user has something to mend first, 130 if interrupted."""
    options = parser().parse_args(arguments)
    # A scheduler's SIGTERM is a Ctrl-C: either way what this command started is stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = options.work(options)
    except BouquetError as error:
        print(f"bouquet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bouquet: interrupted", file=sys.stderr)
        return 130
    return code


def parser() -> argparse.ArgumentParser:
    """What is understood on the command line; a subcommand's function is its ``work``."""
    whole = argparse.ArgumentParser(
        prog="bouquet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    simulation.add_to(commands)
    rules = commands.add_parser("rules", help="list the aggregation rules", description="Example: bouquet rules")
    rules.set_defaults(work=_rules)
    site.add_to(commands)
    doctor.add_to(commands)
    plan.add_to(commands)
    audit.add_to(commands)
    ledger.add_to(commands)
    compare.add_to(commands)
    runs.add_to(commands)
    watch.add_to(commands)
    export.add_to(commands)
    chat.add_to(commands)
    serve.add_to(commands)
    return whole


def rules_table() -> str:
    """Every rule and its properties, as a Markdown table."""
    yes = {True: "yes", False: "no"}
    titles = ("rule", "exact", "linear", "mixed ranks", "privacy", "rate", "bytes up", "bytes down", "paper")
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, rule in RULES.items():
        privacy = "example, local, central" if rule.linear else "example, local"
        costs = (f"{rule.learning_rate:g}", f"`{rule.bytes_up}`", f"`{rule.bytes_down}`")
        facts = (f"`{name}`", yes[rule.exact], yes[rule.linear], yes[rule.mixed_ranks], privacy, *costs, rule.paper)
        rows.append(f"| {' | '.join(facts)} |")
    return "\n".join(rows)


def _rules(_: argparse.Namespace) -> int:
    print(rules_table())
    return 0
