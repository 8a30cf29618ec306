"""The README's tables, of the rules and of the other axes, and its tree."""

from deploy.command import rules_table
from docs.generate.text import code, part, table
from docs.generate.tree import tree
from strategies import AXES


def readme(text: str) -> str:
    """The README with its generated parts."""
    for name, body in (("rules", rules_table()), ("axes", axes_table()), ("tree", tree())):
        text = part(text, name, body)
    return text


def axes_table() -> str:
    """What there is to choose beside the rule, as a table in Markdown."""
    rows = (
        [code(f"{axis.section}.name"), axis.chooses, ", ".join(map(code, axis.names)), code(axis.default)]
        for axis in AXES
        if axis.section != "rule"
    )
    return table(["setting", "what it chooses", "choices", "default"], rows)
