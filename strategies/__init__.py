"""The methods: one room an axis, one file a member; and the recipe that is made of them.

Importing it loads no Flower; ``strategies.strategy`` does.
"""

from strategies.recipe import Recipe
from strategies.registries import AXES, read_config
from strategies.rules import RULES
from strategies.rules.rule import Rule

__all__ = ["AXES", "RULES", "Recipe", "Rule", "read_config"]
