"""The laws between the axes: which choices go together, and what would fit where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.error import BouquetError
from common.method import AUTO
from strategies.gradients import GRADIENTS
from strategies.means import Weighted
from strategies.rules import RULES
from strategies.rules.rule import MeanRule

if TYPE_CHECKING:
    from strategies.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Raise :class:`BouquetError` where two choices of a recipe clash."""
    _check_rule(recipe)
    _check_init(recipe)
    _check_node(recipe)
    _check_privacy(recipe)


def _check_rule(recipe: Recipe) -> None:
    """What stands on other axes and would be ignored, or is the rule's own to choose."""
    flat, rule = recipe.config.methods, recipe.rule
    mean, optimizer = flat["mean.name"], flat["server-optimizer.name"]
    if not isinstance(rule, MeanRule) and (mean, optimizer) != ("weighted", "none"):
        raise BouquetError(
            f"the rule '{rule.name}' takes more than a mean",
            where=f"mean.name = '{mean}', server-optimizer.name = '{optimizer}'",
            expected="mean.name = 'weighted' and server-optimizer.name = 'none'",
            cure=f"Rules that take these are {', '.join(n for n, r in RULES.items() if issubclass(r, MeanRule))}.",
        )
    for axis, own in (("adapter", rule.structure.name), ("keep", rule.keeps)):
        if (name := flat[f"{axis}.name"]) not in (AUTO, own):
            raise BouquetError(
                f"the rule '{rule.name}' goes with another choice",
                where=f"{axis}.name",
                expected=f"'{own}' or '{AUTO}'",
                got=str(name),
            )


def _check_init(recipe: Recipe) -> None:
    """A start that is not drawn has to fit the structure, and be every node's."""
    rule, init = recipe.rule, recipe.init
    if init.name == rule.init:
        return
    if init.orthonormal != (recipe.structure.name == "core"):
        fitting = "orthonormal or lora-sb" if recipe.structure.name == "core" else "drawn or lora-ga"
        raise BouquetError(
            f"an init that does not fit what the rule '{rule.name}' trains",
            where="init.name",
            expected=f"'{AUTO}', or {fitting}",
            got=init.name,
        )
    if rule.mixed_ranks or rule.restarts or rule.settled:
        raise BouquetError(
            f"the rule '{rule.name}' makes starts of its own, which its init has to agree with",
            where="init.name",
            expected=f"'{AUTO}' or '{rule.init}'",
            got=init.name,
        )


def _check_node(recipe: Recipe) -> None:
    """What a node does with what it trains."""
    fitting = recipe.optimizer.structures
    if fitting is not None and recipe.structure.name not in fitting:
        raise BouquetError(
            f"the optimizer '{recipe.optimizer.name}' does not know what the rule '{recipe.rule.name}' trains",
            where="optimizer.name",
            expected="adamw",
            got=recipe.optimizer.name,
        )
    if recipe.objective.remembers and not _averages_what_it_trains(recipe):
        raise BouquetError(
            f"the objective '{recipe.objective.name}' sends a correction that '{recipe.rule.name}' would merge",
            where="objective.name",
            expected="none or fedprox, or a rule that averages what it trains",
            got=recipe.objective.name,
        )


def _of_gradients(private: bool) -> str:
    return " or ".join(name for name, gradient in GRADIENTS.items() if gradient.private == private)


def _averages_what_it_trains(recipe: Recipe) -> bool:
    """Whether the mean is of the very tensors that a node has trained, but for those that it keeps."""
    rule, kept = recipe.rule, frozenset().union(*(keep.parts for keep in recipe.keeps))
    plan = rule.plan(rule.settled)
    return isinstance(rule, MeanRule) and not rule.relative and plan.trained <= plan.sent | kept


def _check_privacy(recipe: Recipe) -> None:
    privacy, rule, name = recipe.config.privacy, recipe.rule, recipe.rule.name
    if privacy.per_example != recipe.gradient.private:
        raise BouquetError(
            "a gradient that does not fit the privacy mode",
            where=f"gradient.name, privacy.mode = '{privacy.mode}'",
            expected=_of_gradients(private=privacy.per_example),
            got=recipe.gradient.name,
        )
    if privacy.on and (recipe.objective.passes > 1 or recipe.objective.remembers):
        raise BouquetError(
            f"the objective '{recipe.objective.name}' lets more of the data out than a private run counts",
            where=f"objective.name, privacy.mode = '{privacy.mode}'",
            expected="none or fedprox",
            got=recipe.objective.name,
        )
    if privacy.central and not rule.linear:
        linear = ", ".join(other for other, kind in RULES.items() if kind.linear)
        raise BouquetError(
            f"the rule '{name}' needs more of the updates than their mean, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central'",
            expected=f"one of {linear}",
            got=name,
            cure="Choose another rule, or privacy.mode = 'example' or 'update-local', which fit every rule.",
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
            f"with the rule '{name}' the size of a message tells what a node learned, and no noise covers a size",
            where="privacy.mode = 'update-local'",
            expected=rule.shrinks,
            cure="Choose another rule, or privacy.mode = 'example', whose training is private as a whole.",
        )
