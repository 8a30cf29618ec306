"""The laws of a private run: what is bounded, noised and counted, and what is not."""

from common.error import BouquetError
from common.method import AUTO, listed
from strategies.choices import Choices
from strategies.gradients import knowing
from strategies.laws.objective import forgetful
from strategies.means import Weighted
from strategies.rules import RULES
from strategies.rules.mean import MeanRule


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where a private run would let out what no noise covers."""
    _check_gradients(choices)
    _check_changes(choices)


def _check_gradients(choices: Choices) -> None:
    """What is bounded and noised in a node's steps, and how often data are looked at there."""
    privacy, rule, name = choices.config.privacy, choices.rule, choices.rule.name
    known = knowing(rule.structure)
    if privacy.per_example != (choices.gradient.engine is not None):
        raise BouquetError(
            "a gradient that does not fit the privacy mode",
            where=f"gradient.name, privacy.mode = '{privacy.mode}'",
            expected=listed([n for n, kind in known.items() if (kind.engine is not None) == privacy.per_example]),
            got=choices.gradient.name,
        )
    trained = rule.plan(rule.settled).trained | rule.plan(rule.settled + 1).trained
    if privacy.per_example and (loose := trained & rule.structure.loose):
        raise BouquetError(
            f"the rule '{name}' trains tensors outside linear layers, which have no gradient for each example",
            where="rule.name, privacy.mode = 'example'",
            expected=f"a rule that trains only {', '.join(sorted(trained - loose)) or 'linear layers'}",
            got=f"{', '.join(sorted(trained))} of '{rule.structure.name}'",
            cure=f"Leave it out where rule.{name}.* has an option for that, or choose another rule.",
        )
    if not choices.gradient.knows(rule.structure):
        raise BouquetError(
            f"the gradient '{choices.gradient.name}' does not support what the rule '{name}' trains",
            where="gradient.name",
            expected=f"'{AUTO}', or {listed(list(known))}",
            got=choices.gradient.name,
        )
    if privacy.on and (choices.objective.passes > 1 or choices.objective.remembers):
        raise BouquetError(
            f"the objective '{choices.objective.name}' releases more of the data than a private run accounts for",
            where=f"objective.name, privacy.mode = '{privacy.mode}'",
            expected=forgetful(),
            got=choices.objective.name,
        )


def _check_changes(choices: Choices) -> None:
    """What is bounded and noised of a node's whole change, and what a message's size says of it."""
    privacy, rule, name = choices.config.privacy, choices.rule, choices.rule.name
    if privacy.central and not rule.linear:
        linear = ", ".join(other for other, kind in RULES.items() if kind.linear)
        raise BouquetError(
            f"the rule '{name}' needs more of the updates than their mean, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central'",
            expected=f"one of {linear}",
            got=name,
            cure="Choose another rule, or privacy.mode = 'example' or 'update-local'.",
        )
    if privacy.central and isinstance(rule, MeanRule) and rule.mean != Weighted():
        raise BouquetError(
            "a robust mean looks at every update, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central', mean.name",
            expected="weighted",
            got=rule.mean.name,
        )
    if privacy.whole_change and rule.shrinks:
        raise BouquetError(
            f"with the rule '{name}' the size of a message reveals what a node learned, and noise cannot hide a size",
            where="privacy.mode = 'update-local'",
            expected=rule.shrinks,
            cure="Choose another rule, or privacy.mode = 'example', whose training is private as a whole.",
        )
