"""A node that trains with its operator's own script.

What is received, checked, charged, noised and sent, in which order, is every node's (:class:`Session`): other are the
model, which is the trainer's, a round's training, and the score.
"""

import traceback
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from flwr.app import Context

from client_app import trainer
from client_app.examples import Examples
from client_app.session import Session
from client_app.training import Training, turn_of
from client_app.units import Units
from common import tasks
from common.adapter.lora import Lora
from common.adapter.values import State
from common.config.node import NodeConfig
from common.error import RefusalError
from common.models.adapted import LoraModel
from common.models.borrowed import borrow
from common.sources import files
from common.sources.counts import Counts
from common.tasks import Example, Score
from common.tasks.text import Text
from strategies import Recipe
from strategies.gradients import Backward
from strategies.objectives import Plain
from strategies.optimizers import AdamW
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Rule


def session_of(context: Context, node: NodeConfig) -> Session:
    """What works on a message to this node."""
    return ScriptSession(context) if node.script else Session(context)


class ScriptSession(Session):
    """A session whose model, examples and training are those of a script's trainer.

    The script has read the records when it hands its trainer over. So in a run whose noise is the node's own, nothing
    may tell that it failed, nor that it did not: where it cannot be used, for whatever reason, Bouquet's own model
    stands in, takes what is received, learns nothing, and the noise leaves alone.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if found := [*mistakes(self.recipe)]:
            raise RefusalError("\n  ".join(["a run that a script's trainer cannot take part in:", *found]))

    @cached_property
    def _trainer(self) -> Any:
        """What the script has handed over; None where it cannot be used and that may not be told."""
        try:
            return self._fitting()
        except Exception:
            if not self.config.privacy.guarded:
                raise
            traceback.print_exc()
            return None

    def _fitting(self) -> Any:
        """The script's trainer. Raises whatever the script raises, and :class:`RefusalError` for another model."""
        return trainer.fitting(self.node.script, self.config)

    def load(self) -> LoraModel:
        """The trainer's own model, or what stands in for it."""
        return super().load() if self._trainer is None else borrow(self._trainer.model)

    def examples(self) -> Examples:
        """What the trainer learns from, and what it is scored on, as it has them."""
        train, heldout = self._trainer.train_dataset, self._trainer.eval_dataset or ()
        self.policy.check_data(len(train))
        number = len(train) + len(heldout)
        return Examples(train, heldout, Counts(records=number, examples=number))

    def _units(self) -> Units:
        """One unit, into which the trainer alone looks: what is private is the change as a whole."""
        return Units([()] if self._trainer else [], [])

    def _check_units(self) -> None:
        """Raise what is wrong with the script or its trainer."""
        self._fitting()

    def _stamp(self) -> files.Stamp:
        return trainer.stamp(self.node.script)

    def _train(self, model: LoraModel, state: State, examples: Sequence[Example]) -> Training:
        seed = f"{self.config.seed}/{self.node.label}/{state.round}"
        turn = turn_of(self.recipe, state, model.keys, seed)
        return self._taught(turn, lambda turn: trainer.train(self._trainer, model, turn))

    def _score(self, model: LoraModel) -> Score:
        if type(self.task).figure is not Text.figure:
            raise RefusalError(
                "a score that a trainer's loss cannot provide",
                where="task.name",
                expected="a task that is scored by its loss per token",
                got=f"'{self.task.name}', scored by {self.task.metric}",
                cure="Let the run score elsewhere: evaluation.every=0.",
            )
        return trainer.score(self._trainer)


def mistakes(recipe: Recipe) -> Iterator[str]:
    """What a run asks for that is the trainer's to decide, or that no trainer of others' does."""
    config, rule = recipe.config, recipe.rule
    plain = isinstance(rule, MeanRule) and recipe.structure == Lora() and type(rule).penalty is Rule.penalty
    if not plain:
        yield f"rule.name: expected one that averages LoRA's factors and adds no term to the loss, got {rule.name!r}"
    if config.lora.rank_pattern:
        yield f"lora.rank-pattern: expected one rank for all layers, got {config.lora.rank_pattern!r}"
    if config.privacy.per_example:
        yield "privacy.mode: expected none, update-local or update-central, got 'example'"
    if (classes := tasks.classes(config.task)) != 0:
        why = "has a head" if classes else "needs the vectors of texts"
        yield f"task.name: expected a language model's, got {config.task.name!r}, which {why}"
    for chosen, usual in ((recipe.optimizer, AdamW()), (recipe.objective, Plain()), (recipe.gradient, Backward())):
        if chosen != usual:
            yield f"{chosen.section}.name: expected {usual.name!r} with its defaults, got {chosen}"
