"""Whole runs of a model that sees images: what it learns is to be seen and not to be read."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from common import tasks
from common.models import base, lengths
from common.sources import dealing
from deploy.command import main
from strategies import read_config
from tests.support.grid import run_in_process
from tests.support.outcome import failures, lines
from tests.support.private_runs import PRIVATE
from tests.support.vision import COLOURS, PARTS, paint, save_llava, save_records

LEARNED = {"train.steps": 30, "train.learning-rate": 0.01, "task.max-length": 64}


@pytest.fixture
def of(settings, tmp_path):
    """The config of a run over images of two colours; of a template that takes parts of what is said."""

    def built(**changes):
        source = save_records(tmp_path / "data", 32)
        place = str(save_llava(tmp_path / "llava", PARTS))
        data = {"data.source": str(source), "data.partition": "iid", "data.holdout": 0.25, "data.limit": 0}
        return settings(**data | {"model.name": place, "task.name": "vision"} | LEARNED | changes)

    return built


def heldout(folder):
    return [line for line in lines(folder) if line["phase"] == "heldout"]
