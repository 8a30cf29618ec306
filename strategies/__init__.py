"""The methods: one folder per axis, one file per member; and the recipe that is made of them.

Importing it loads no Flower. The strategies do, when one is asked for: ``from strategies import FFALoraStrategy``.
"""

from typing import TYPE_CHECKING, Any

from strategies.recipe import Recipe
from strategies.registries import AXES, read_config
from strategies.rules import RULES
from strategies.rules.rule import Rule

if TYPE_CHECKING:
    from strategies.strategy import LoraStrategy

__all__ = ["AXES", "RULES", "LoraStrategy", "Recipe", "Rule", "read_config"]


def __getattr__(name: str) -> Any:
    if name == "LoraStrategy" or name.endswith("Strategy"):
        from strategies.rule_strategies import STRATEGIES
        from strategies.strategy import LoraStrategy

        found = {"LoraStrategy": LoraStrategy, **STRATEGIES}
        if name in found:
            return found[name]
    raise AttributeError(f"module 'strategies' has no attribute '{name}'")
