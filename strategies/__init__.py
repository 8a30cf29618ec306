"""The rules, by name. Importing them loads no Flower; ``strategies.strategy`` does."""

from collections.abc import Mapping
from dataclasses import fields
from inspect import get_annotations
from typing import Any

from common.config.run import MergeConfig, RuleOption, RunConfig
from common.error import BouquetError
from common.tasks import TASKS
from strategies.mean import Mean, MultiKrum, TrimmedMean, WeightedMean
from strategies.optimizer import FedAdam, FedAvgM, ServerOptimizer
from strategies.rules.fed_plora import FedPLora
from strategies.rules.fed_sb import FedSB
from strategies.rules.fedex_lora import FedExLora
from strategies.rules.fedit import FedIT
from strategies.rules.fedmomentum import FedMomentum
from strategies.rules.fedrot_lora import FedRotLora
from strategies.rules.fedsa_lora import FedSALora
from strategies.rules.fedsvd import FedSVD
from strategies.rules.ffa_lora import FFALora
from strategies.rules.flasc import FLASC
from strategies.rules.flexlora import FlexLora
from strategies.rules.flora import FLora
from strategies.rules.florist import FLoRIST
from strategies.rules.hetlora import HetLora
from strategies.rules.local import Local
from strategies.rules.lora_fair import LoraFair
from strategies.rules.lora_lego import LoraLego
from strategies.rules.ravan import Ravan
from strategies.rules.rolora import RoLora
from strategies.rules.rule import MeanRule, Plan, Rule
from strategies.rules.stack import StackRule

RULES: Mapping[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        FedIT,
        FFALora,
        RoLora,
        FedSALora,
        FedSB,
        FedSVD,
        Ravan,
        FedRotLora,
        FLora,
        FlexLora,
        FedExLora,
        LoraFair,
        FLoRIST,
        FedMomentum,
        HetLora,
        FedPLora,
        FLASC,
        LoraLego,
        Local,
    )
}

OPTIONS: Mapping[str, RuleOption] = {
    f"{name}.{field.name.replace('_', '-')}": field.default
    for name, rule in RULES.items()
    for field in fields(rule)
    if field.name in get_annotations(rule) and isinstance(field.default, RuleOption)
}
"""Every rule's own hyperparameters and their defaults, by ``rule.field``; ``rule.<name>.<field>`` in the run config."""


def read_config(flat: Mapping[str, Any]) -> RunConfig:
    """Flower's flat run config, with the names and hyperparameters of the rules and tasks known.

    A learning rate that is left open is the rule's own from here on.
    """
    config = RunConfig.from_flower(flat, {"rule.name": list(RULES), "task.name": list(TASKS)}, OPTIONS)
    rate = config.train.learning_rate or RULES[config.rule.name].learning_rate
    return config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": rate})})


def build(config: RunConfig) -> Rule:
    """The rule that the config names, with its hyperparameters.

    Raises :class:`BouquetError` on one out of range, and where the privacy mode or a merge setting does not fit.
    """
    name, merge = config.rule.name, config.merge
    rule = RULES[name]
    options: dict[str, Any] = {
        key.split(".")[1].replace("-", "_"): value
        for key, value in config.rule.options.items()
        if key.split(".")[0] == name
    }
    if issubclass(rule, MeanRule):
        options["mean"] = _mean(merge)
        if merge.optimizer != "auto":
            options["optimizer"] = _optimizer(merge)
    elif merge.mean != "weighted" or merge.optimizer not in ("auto", "none"):
        raise BouquetError(
            f"the rule '{name}' takes more than a mean",
            where=f"merge.mean = '{merge.mean}', merge.optimizer = '{merge.optimizer}'",
            expected="merge.mean = 'weighted' and merge.optimizer = 'none'",
            cure=f"Rules that take these are {', '.join(n for n, r in RULES.items() if issubclass(r, MeanRule))}.",
        )
    built = rule(head=config.task.head, offset_energy=merge.offset_energy, **options)
    _check_privacy(config, built)
    return built


def _check_privacy(config: RunConfig, rule: Rule) -> None:
    mode, name = config.privacy.mode, rule.name
    if mode == "update-central" and not rule.linear:
        linear = ", ".join(other for other, kind in RULES.items() if kind.linear)
        raise BouquetError(
            f"the rule '{name}' needs more of the updates than their mean, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central'",
            expected=f"one of {linear}",
            got=name,
            cure="Choose another rule, or privacy.mode = 'example' or 'update-local', which fit every rule.",
        )
    if mode == "update-central" and config.merge.mean != "weighted":
        raise BouquetError(
            "a robust mean looks at every update, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central', merge.mean",
            expected="weighted",
            got=config.merge.mean,
        )
    if mode == "update-local" and rule.shrinks:
        raise BouquetError(
            f"with the rule '{name}' the size of a message tells what a node learned, and no noise covers a size",
            where="privacy.mode = 'update-local'",
            expected="rule.hetlora.keep = 1.0",
            cure="Set it, choose another rule, or privacy.mode = 'example', whose training is private as a whole.",
        )


def _mean(merge: MergeConfig) -> Mean:
    if merge.mean == "krum":
        return MultiKrum(merge.hostile)
    if merge.mean == "weighted":
        return WeightedMean()
    return TrimmedMean(merge.trim if merge.mean == "trimmed" else 0.5)


def _optimizer(merge: MergeConfig) -> ServerOptimizer | None:
    rate = {"rate": merge.learning_rate} if merge.learning_rate else {}
    if merge.optimizer == "momentum":
        return FedAvgM(momentum=merge.momentum, **rate)
    if merge.optimizer == "adam":
        return FedAdam(momentum=merge.momentum, beta=merge.second_momentum, tau=merge.tau, **rate)
    return None


__all__ = [
    "FLASC",
    "OPTIONS",
    "RULES",
    "FFALora",
    "FLoRIST",
    "FLora",
    "FedAdam",
    "FedAvgM",
    "FedExLora",
    "FedIT",
    "FedMomentum",
    "FedPLora",
    "FedRotLora",
    "FedSALora",
    "FedSB",
    "FedSVD",
    "FlexLora",
    "HetLora",
    "Local",
    "LoraFair",
    "LoraLego",
    "MeanRule",
    "MultiKrum",
    "Plan",
    "Ravan",
    "RoLora",
    "Rule",
    "StackRule",
    "TrimmedMean",
    "build",
    "read_config",
]
