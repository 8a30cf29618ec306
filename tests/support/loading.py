"""Checkpoints of the families, loaded and started as a run would."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from common import tasks
from common.config.run import RunConfig
from common.models import adapted, base
from common.tasks import Example
from strategies import Recipe, read_config
from tests.support.architectures import save


@cache
def checkpoint(family: str) -> Path:
    return save(family, Path(mkdtemp()) / family)


def settings(folder: Path, task: str, quantisation: str = "none", **more: Any) -> RunConfig:
    flat = {"model.name": str(folder), "task.name": task, "model.quantization": quantisation, "train.steps": 2}
    return read_config(flat | {"train.batch-size": 4, "task.max-length": 64, "task.negatives": "own"} | more)


def loaded(config: RunConfig) -> adapted.LoraModel:
    """The model, started as a run would start it."""
    network = base.load(config.model, tasks.classes(config.task), torch.device("cpu"))
    model = adapted.LoraModel(network, config.lora)
    state = Recipe.build(config).start(model.spec, seed=0)
    model.install(state.adapter, state.scale, {})
    return model


def logits(model: adapted.LoraModel, task: tasks.Task, example: Example) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(task.collate([example], 0))
