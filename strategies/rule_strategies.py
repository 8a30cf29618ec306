"""A Flower strategy for every rule, by name: ``FFALoraStrategy``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from strategies.recipe import Recipe
from strategies.registries import read_config
from strategies.rules import RULES
from strategies.rules.rule import Rule
from strategies.strategy import LoraStrategy

OPTIONS = {"fraction_train", "fraction_evaluate", "min_available_nodes", "private_mean", "weigh"}
"""What every strategy takes beside its rule's own."""


def strategy_class(kind: type[Rule]) -> type[LoraStrategy]:
    """Flower's strategy of one rule: :class:`LoraStrategy`, with the rule's hyperparameters as its own options.

    Its further options are ``mean`` and ``optimizer`` where the rule only averages, and those of the run config that
    both sides must have alike: ``seed``, ``head``, ``codec_down``, ``codec_up``.
    """
    own = {field.name: field.default for field in fields(kind)}

    class OneRule(LoraStrategy):
        def __init__(
            self,
            *,
            seed: int = 0,
            head: str = "shared",
            codec_down: str = "fp32",
            codec_up: str = "fp32",
            **options: Any,
        ) -> None:
            if unknown := options.keys() - own.keys() - OPTIONS:
                raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
            flat = {"seed": seed, "task.head": head, "wire.down": codec_down, "wire.up": codec_up}
            rule = kind(**{name: value for name, value in options.items() if name in own})
            rest = {name: value for name, value in options.items() if name not in own}
            super().__init__(Recipe.around(rule, read_config({**flat, "rule.name": kind.name})), **rest)

    OneRule.__name__ = OneRule.__qualname__ = f"{kind.__name__}Strategy"
    OneRule.__doc__ = f"{(kind.__doc__ or kind.name).strip()}\n\nThe rule '{kind.name}', {kind.paper}."
    return OneRule


STRATEGIES: Mapping[str, type[LoraStrategy]] = {
    f"{kind.__name__}Strategy": strategy_class(kind) for kind in RULES.values()
}
"""A strategy for every rule, by its name: ``FFALoraStrategy``."""
