"""A node that trains by its operator's own script.

What is received, checked, charged, noised and sent, in which order, is every node's (:class:`Session`): other are the
model, which is the trainer's, a round's training, and the score.
"""

import traceback
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
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
from common.models import adapted
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
from strategies.rules.rule import MeanRule, Rule


def session_of(context: Context, node: NodeConfig) -> Session:
    """What works on a message to this node."""
    return ScriptSession(context) if node.script else Session(context)


class ScriptSession(Session):
    """A session whose model, examples and training are those of a script's trainer.

    In a run whose noise is the node's own the script is run, and may fail, on account of the records. Then Bouquet's
    own model stands in: it takes what is received, learns nothing, and the noise leaves alone.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if found := [*mistakes(self.recipe)]:
            raise RefusalError("\n  ".join(["a run that a script's trainer cannot take part in:", *found]))

    @cached_property
    def _trainer(self) -> Any:
        """What the script has handed over; None where it fails and that may not be told."""
        try:
            return trainer.trainer_of(self.node.script, self._stamp())
        except Exception:
            if not self.config.privacy.guarded:
                raise
            traceback.print_exc()
            return None

    def load(self) -> LoraModel:
        """The trainer's own model. Raises :class:`RefusalError` where it is not what the run trains."""
        if self._trainer is None:
            return super().load()
        config, model = self.config, borrow(self._trainer.model)
        model.check(adapted.describe(config.model, config.lora, config.task), config.model)
        return model

    def examples(self) -> Examples:
        """What the trainer learns from, and what it is scored on, as it has them."""
        self.load()
        train, heldout = self._trainer.train_dataset, self._trainer.eval_dataset or ()
        self.policy.check_data(len(train))
        number = len(train) + len(heldout)
        return Examples(train, heldout, Counts(records=number, examples=number))

    def _units(self) -> Units:
        """One unit, into which the trainer alone looks: what is private is the change as a whole."""
        return Units([()] if self._trainer else [], [])

    def _check_units(self) -> None:
        """Raise whatever the script raises."""
        trainer.trainer_of(self.node.script, self._stamp())

    def _stamp(self) -> files.Stamp:
        """The state of the script. Raises :class:`RefusalError` where there is none."""
        try:
            return files.stamp_of([Path(self.node.script).expanduser()])
        except OSError as error:
            raise RefusalError(
                "a node's script cannot be read",
                where="script, of the node's config",
                got=f"{self.node.script}: {error.strerror}",
                cure="Name a Python file that whoever runs the node can read.",
            ) from error

    def _train(self, model: LoraModel, state: State, examples: Sequence[Example]) -> Training:
        seed = f"{self.config.seed}/{self.node.label}/{state.round}"
        return trainer.train(self._trainer, model, turn_of(self.recipe, state, model.keys, seed))

    def _score(self, model: LoraModel) -> Score:
        if type(self.task).figure is not Text.figure:
            raise RefusalError(
                "a score that a trainer's loss does not give",
                where="task.name",
                expected="a task that is scored by its loss a token",
                got=f"'{self.task.name}', scored by {self.task.metric}",
                cure="Let the run score elsewhere: evaluation.every=0.",
            )
        return trainer.score(self._trainer)


def mistakes(recipe: Recipe) -> Iterator[str]:
    """What a run asks for that is the trainer's to decide, or that no trainer of others' does."""
    config, rule = recipe.config, recipe.rule
    plain = isinstance(rule, MeanRule) and recipe.structure == Lora() and type(rule).penalty is Rule.penalty
    if not plain:
        yield f"rule.name: expected a mean of LoRA's factors without a term in the loss, got {rule.name!r}"
    if config.privacy.per_example:
        yield "privacy.mode: expected none, update-local or update-central, got 'example'"
    if tasks.classes(config.task):
        yield f"task.name: expected a language model's, got {config.task.name!r}, which has a head"
    for chosen, usual in ((recipe.optimizer, AdamW()), (recipe.objective, Plain()), (recipe.gradient, Backward())):
        if chosen != usual:
            yield f"{chosen.section}.name: expected {usual.name!r} as it is by default, got {chosen}"
