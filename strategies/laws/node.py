"""The laws of what a node does with what it trains: its optimizer, and what that keeps."""

from common.adapter.values import FACTORS
from common.error import BouquetError
from common.method import AUTO, listed
from strategies.choices import Choices
from strategies.gradients import knowing
from strategies.optimizers import OPTIMIZERS
from strategies.rules import RULES


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where a node's optimizer does not suit what is trained."""
    _check_optimizer(choices)
    _check_optimizer_state(choices)


def _check_optimizer(choices: Choices) -> None:
    """What it needs to see, and which factors in a step."""
    fitting = [name for name, kind in OPTIMIZERS.items() if kind.knows(choices.structure)]
    if choices.optimizer.name not in fitting:
        raise BouquetError(
            f"the optimizer '{choices.optimizer.name}' does not support what the rule '{choices.rule.name}' trains",
            where="optimizer.name",
            expected=listed(fitting),
            got=choices.optimizer.name,
        )
    if choices.optimizer.denoises and not choices.config.privacy.per_example:
        raise BouquetError(
            f"the optimizer '{choices.optimizer.name}' is about the noise in a step's gradients, and there is none",
            where=f"optimizer.name, privacy.mode = '{choices.config.privacy.mode}'",
            expected=f"privacy.mode = 'example', or {listed([n for n in fitting if not OPTIMIZERS[n].denoises])}",
            got=choices.optimizer.name,
        )
    plan = choices.rule.plan(choices.rule.settled)
    if choices.optimizer.alternates() and not plan.trained >= FACTORS:
        raise BouquetError(
            f"the optimizer '{choices.optimizer.name}' trains both factors in turns, '{choices.rule.name}' does not",
            where="optimizer.name",
            expected=listed([name for name in fitting if not OPTIMIZERS[name].alternates()]),
            got=choices.optimizer.name,
        )
    known = knowing(choices.structure)
    if choices.optimizer.alternates() and not choices.gradient.rests:
        raise BouquetError(
            f"the gradient '{choices.gradient.name}' covers everything that is trained, in every step",
            where=f"gradient.name, optimizer.name = '{choices.optimizer.name}'",
            expected=f"'{AUTO}', or {listed([name for name, kind in known.items() if kind.rests])}",
            got=choices.gradient.name,
        )


def _check_optimizer_state(choices: Choices) -> None:
    """Moments are of the very factors that a node goes on with."""
    if choices.config.train.keeps_optimizer and not choices.rule.goes_on():
        raise BouquetError(
            f"a node's optimizer state cannot be kept under the rule '{choices.rule.name}', which gives the node "
            "other factors or another rank than it trained",
            where="train.optimizer-state",
            expected=f"'reset', or one of {listed([name for name, kind in RULES.items() if kind.goes_on()])}",
            got="kept",
        )
