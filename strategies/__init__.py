"""The rules, by name. Importing them loads no Flower; ``strategies.strategy`` does."""

from collections.abc import Mapping

from strategies.fedex_lora import FedExLora
from strategies.fedit import FedIT
from strategies.ffa_lora import FFALora
from strategies.rule import MeanRule, Plan, Rule

RULES: Mapping[str, type[Rule]] = {rule.name: rule for rule in (FedIT, FFALora, FedExLora)}

__all__ = ["RULES", "FFALora", "FedExLora", "FedIT", "MeanRule", "Plan", "Rule"]
