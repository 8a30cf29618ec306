"""What every process of a node begins with, its children among them: threads and log, the run's recipe, its model."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from common.config.node import NodeConfig
from common.models import adapted, kernels
from common.models.adapted import LoraModel
from strategies import Recipe


def prepare() -> None:
    """What every process of a node wants before it works: the threads that it may have, and a log without bars."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def recipe_of(run_config: Mapping[str, Any]) -> Recipe:
    """A run's recipe, with the type that keeps an example's companions out of its gradient, where that is left open."""
    recipe = Recipe.read(run_config)
    config = recipe.config
    if not config.privacy.per_example or config.model.dtype != "auto":
        return recipe
    exact = config.model.model_copy(update={"dtype": "float32"})
    return replace(recipe, config=config.model_copy(update={"model": exact}))


def model_of(recipe: Recipe, node: NodeConfig) -> LoraModel:
    """The model of a run on the first of a node's devices, computed as the node says, with the recipe's adapter."""
    config, device = recipe.config, node.devices[0]
    model = adapted.load(config.model, config.lora, config.task, device, recipe.structure, config.privacy.mode)
    kernels.choose(model, node)
    return model
