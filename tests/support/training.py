"""One round of local training on a model at hand, without a federation around it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from client_app.training import Training, Turn, train
from common.adapter.values import Key
from common.config.run import RunConfig, TrainConfig
from common.models.adapted import LoraModel
from common.tasks import Example, Task
from strategies import Recipe
from strategies.rules import FedIT


def recipe_of(config: TrainConfig, **choices: Any) -> Recipe:
    """A recipe of FedIT for a run of one round that trains so; ``choices`` are members of other axes."""
    run = RunConfig().model_copy(update={"train": config, "num_server_rounds": 1})
    return replace(Recipe.around(FedIT(), run), **choices)


def train_plainly(
    model: LoraModel, task: Task, examples: Sequence[Example], config: TrainConfig, keys: Sequence[Key] = ()
) -> Training:
    """One round on ``examples``, of ``keys`` or of all that the model has."""
    return train(model, recipe_of(config), task, examples, Turn(0, keys or model.keys, seed="s"))
