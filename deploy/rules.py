"""``bouquet rules``: the aggregation rules and their properties."""

import argparse

from deploy.settings import Commands
from strategies import RULES


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    rules = commands.add_parser("rules", help="list the aggregation rules", description="Example: bouquet rules")
    rules.set_defaults(work=_rules)


def rules_table() -> str:
    """Every rule and its properties, as a Markdown table."""
    yes = {True: "yes", False: "no"}
    titles = ("rule", "exact", "linear", "mixed ranks", "privacy", "bytes up", "bytes down", "paper")
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, rule in RULES.items():
        privacy = "example, local, central" if rule.linear else "example, local"
        costs = (f"`{rule.bytes_up}`", f"`{rule.bytes_down}`")
        facts = (f"`{name}`", yes[rule.exact], yes[rule.linear], yes[rule.mixed_ranks], privacy, *costs, rule.paper)
        rows.append(f"| {' | '.join(facts)} |")
    return "\n".join(rows)


def _rules(_: argparse.Namespace) -> int:
    print(rules_table())
    return 0
