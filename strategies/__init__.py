"""The rules, by name. Importing them loads no Flower; ``strategies.strategy`` does."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from common.config import RunConfig
from common.error import BouquetError
from common.tasks import TASKS
from strategies.fedex_lora import FedExLora
from strategies.fedit import FedIT
from strategies.fedmomentum import FedMomentum
from strategies.fedrot_lora import FedRotLora
from strategies.fedsa_lora import FedSALora
from strategies.fedsvd import FedSVD
from strategies.ffa_lora import FFALora
from strategies.flexlora import FlexLora
from strategies.flora import FLora
from strategies.florist import FLoRIST
from strategies.lora_fair import LoraFair
from strategies.rolora import RoLora
from strategies.rule import MeanRule, Plan, Rule, StackRule

RULES: Mapping[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        FedIT,
        FFALora,
        RoLora,
        FedSALora,
        FedSVD,
        FedRotLora,
        FLora,
        FlexLora,
        FedExLora,
        LoraFair,
        FLoRIST,
        FedMomentum,
    )
}

OPTIONS: Mapping[str, float] = {
    f"{name}.{field.name}": field.default
    for name, rule in RULES.items()
    for field in fields(rule)
    if isinstance(field.default, float)
}
"""Every rule's own hyperparameters and their defaults, by ``rule.field``; ``rule.<name>.<field>`` in the run config."""


def read_config(flat: Mapping[str, Any]) -> RunConfig:
    """Flower's flat run config, with the names and hyperparameters of the rules and tasks known."""
    return RunConfig.from_flower(flat, {"rule.name": list(RULES), "task.name": list(TASKS)}, OPTIONS)


def build(config: RunConfig) -> Rule:
    """The rule that the config names, with its hyperparameters.

    Raises :class:`BouquetError` on one out of range, and on a rule that the privacy mode cannot serve.
    """
    name = config.rule.name
    if config.privacy.mode == "update-central" and not RULES[name].linear:
        linear = ", ".join(other for other, rule in RULES.items() if rule.linear)
        raise BouquetError(
            f"the rule '{name}' needs more of the updates than their mean, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central'",
            expected=f"one of {linear}",
            got=name,
            cure="Choose another rule, or privacy.mode = 'example' or 'update-local', which fit every rule.",
        )
    options = {key.split(".")[1]: value for key, value in config.rule.options.items() if key.split(".")[0] == name}
    return RULES[name](head=config.task.head, **options)


__all__ = [
    "OPTIONS",
    "RULES",
    "FFALora",
    "FLoRIST",
    "FLora",
    "FedExLora",
    "FedIT",
    "FedMomentum",
    "FedRotLora",
    "FedSALora",
    "FedSVD",
    "FlexLora",
    "LoraFair",
    "MeanRule",
    "Plan",
    "RoLora",
    "Rule",
    "StackRule",
    "build",
    "read_config",
]
