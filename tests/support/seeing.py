"""Models that see images, loaded as a run would load them, over records of one image and of two."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from common import tasks
from common.models import base, lengths
from common.models.adapted import LoraModel
from common.sources import dealing
from strategies import read_config
from tests.support import vision
from tests.support.private_steps import scattered

KINDS = {
    "llava": vision.save_llava,
    "llava in parts": lambda folder: vision.save_llava(folder, vision.PARTS),
    "llava-next": vision.save_llava_next,
    "qwen2-vl": vision.save_qwen2_vl,
}


@cache
def checkpoint(kind: str) -> Path:
    if kind == "qwen2-vl":
        pytest.importorskip("torchvision", reason="Qwen2-VL's processor, which reads films too, wants torchvision")
    return KINDS[kind](Path(mkdtemp()) / "seeing")


@cache
def data() -> Path:
    """Records of one image and of two, of several sizes, with questions of several lengths."""
    folder = Path(mkdtemp())
    file = vision.save_records(folder, 7)
    more = [
        vision.record(["images/0.png", "images/1.png"], "red and blue"),
        vision.record("images/2.png", "red") | {"input": "Say it in one word, please, and in small letters"},
    ]
    with file.open("a") as opened:
        opened.writelines(f"{vision.json.dumps(each)}\n" for each in more)
    return file


def settings(kind: str, quantisation: str = "none", **more: Any) -> Any:
    flat = {"model.name": str(checkpoint(kind)), "task.name": "vision", "model.quantization": quantisation}
    return read_config(flat | {"train.steps": 2, "train.batch-size": 4, "task.max-length": 192} | more)


def examples(config: Any) -> tuple[tasks.Task, list[tasks.Example]]:
    task = lengths.widest(config, str(data()))
    read, _ = tasks.encoded(task, dealing.read(str(data())), base.load_tokenizer(config.model))
    return task, [example for record in read for example in record]


def loaded(config: Any) -> LoraModel:
    """With factors that all matter."""
    return scattered(LoraModel(base.load(config.model, 0, torch.device("cpu")), config.lora))
