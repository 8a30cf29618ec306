"""The laws of a node's objective: what it takes for granted of what is sent, comes back, and lies under the factors."""

from common.error import BouquetError
from common.method import listed
from strategies.choices import Choices
from strategies.means import Weighted
from strategies.objectives import OBJECTIVES
from strategies.rules import RULES
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Rule
from strategies.server_optimizers import ToTheMean


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where what a node's objective takes for granted is not so."""
    flat, objective, rule = choices.config.methods, choices.objective, choices.rule
    if objective.compares and not _comes_back_as_its_mean(rule):
        raise BouquetError(
            f"the objective '{objective.name}' takes what comes back for the mean of what the nodes have trained",
            where="objective.name, rule.name, mean.name, server-optimizer.name",
            expected=f"a rule of {listed([n for n, kind in RULES.items() if _comes_back_as_its_mean(kind())])}, "
            "mean.name = 'weighted' and server-optimizer.name = 'none'",
            got=f"'{rule.name}', '{flat['mean.name']}', '{flat['server-optimizer.name']}'",
        )
    if objective.remembers and not _averages_what_it_trains(choices):
        raise BouquetError(
            f"the objective '{objective.name}' sends a correction that '{rule.name}' would merge",
            where="objective.name",
            expected=f"{forgetful()}, or a rule that averages what it trains",
            got=objective.name,
        )
    if objective.over:
        _check_over(choices)
    _check_memory(choices)


def _check_memory(choices: Choices) -> None:
    """What a node remembers corrects a mean over all nodes, and makes one over some of them diverge."""
    share = choices.config.fraction_train
    if choices.objective.remembers and share < 1:
        raise BouquetError(
            f"the objective '{choices.objective.name}' corrects a mean over all nodes, and only some are asked",
            where="objective.name, fraction-train",
            expected="fraction-train = 1.0, or another objective",
            got=f"{share:g}",
        )


def _check_over(choices: Choices) -> None:
    """What an objective that looks at an earlier adapter has to find: that one alone, under factors that look anew."""
    name, rule = choices.objective.name, choices.rule
    if not choices.config.model.adapter:
        raise BouquetError(
            f"the objective '{name}' is about an earlier adapter, and the run starts from none",
            where="objective.name, model.adapter",
            expected="an adapter to start from, or another objective",
            got=f"'{choices.config.model.adapter}'",
        )
    if not _trains_over_it_alone(rule) or choices.init.taken_off():
        raise BouquetError(
            f"the objective '{name}' is about factors that are trained over an earlier adapter, and nothing else",
            where="objective.name, rule.name, adapter.name, init.name",
            expected=f"a rule of {listed([n for n, kind in RULES.items() if _trains_over_it_alone(kind())])}, a plain "
            "LoRA, and a start that adds nothing",
            got=f"'{rule.name}', '{rule.structure.name}', '{choices.init.name}'",
        )


def _trains_over_it_alone(rule: Rule) -> bool:
    """Whether A is trained, and nothing but the adapter that a run starts from is ever under it."""
    trained = rule.plan(rule.settled).trained | rule.plan(rule.settled + 1).trained
    return rule.structure.plain and "A" in trained and not (rule.moves_offset or rule.scattered)


def _comes_back_as_its_mean(rule: Rule) -> bool:
    """Whether a node's next state is the weighted mean of what the nodes have trained, in the frame that they did."""
    plain = isinstance(rule, MeanRule) and (rule.mean, rule.optimizer) == (Weighted(), ToTheMean())
    return plain and not rule.relative and rule.goes_on() and bool(rule.plan(rule.settled).sent)


def _averages_what_it_trains(choices: Choices) -> bool:
    """Whether the mean is of the very tensors that a node has trained, but for those that it keeps."""
    rule, kept = choices.rule, frozenset().union(*(keep.parts for keep in choices.keeps))
    plan = rule.plan(rule.settled)
    return isinstance(rule, MeanRule) and not rule.relative and plan.trained <= plan.sent | kept


def forgetful() -> str:
    """The objectives that let a node's round out as it is, once."""
    return listed([name for name, kind in OBJECTIVES.items() if not kind.remembers and kind.passes == 1])
