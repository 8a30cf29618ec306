"""Whether a run has made progress, or got worse, which is reported at its end."""

from common.adapter.structures import stacked
from common.adapter.values import Key, State
from common.tasks import Task
from server_app.rounds import Outcome
from strategies import Recipe

HARDLY = 0.02
"""What a run's figure has to gain to be another: of itself where lower is better, else in points from 0 to 1."""


def stalled(outcome: Outcome, recipe: Recipe, task: Task) -> str:
    """A line for a run that ended where it began, or worse; empty for one that learned, or had nothing left to learn.

    Either the nodes' view of the last state adds nothing to the base model, or their held-out figure is no better.
    """
    state, before, after = outcome.state, outcome.before, outcome.after
    rate = f"train.learning-rate ({recipe.config.train.learning_rate:g} in this run)"
    cure = f"raise {rate}, train.steps or num-server-rounds"
    if not recipe.personal and _is_base(recipe.rule.view(state, state.rank)):
        return f"the adapter adds nothing to the base model after {state.round} rounds: {cure}"
    if before is None or after is None or before is after:
        return ""
    gain = after.overall - before.overall if task.rises else 1 - after.overall / max(before.overall, 1e-9)
    if gain >= HARDLY or (task.rises and after.overall > 1 - HARDLY):
        return ""
    figures = f"{task.metric} {before.overall:.4g} before and {after.overall:.4g} after"
    if gain <= -HARDLY:
        return f"the run ended worse than it began, held-out {figures}: lower {rate}"
    return f"the run ended where it began, held-out {figures}: {cure}"


def _is_base(state: State) -> bool:
    """Whether no layer's update has a slot whose two factors are both more than zero."""
    factors = stacked(state)
    layers = ((factors[Key(layer, "A")], factors[Key(layer, "B")]) for layer in state.layers())
    return not any((a.any(dim=1) & b.any(dim=0)).any() for a, b in layers)
