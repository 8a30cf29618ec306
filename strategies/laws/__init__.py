"""The laws between the axes: which choices go together, and what would fit where they do not."""

from strategies.choices import Choices
from strategies.laws import init, node, objective, privacy, rule, task


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where two choices clash."""
    for law in (rule, init, node, objective, privacy, task):
        law.check(choices)
