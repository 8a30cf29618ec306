"""The models that people bring: each trains, scores, exports and loads in plain PEFT, or is refused in a sentence."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from client_app.training import outputs, train
from common import base, models, tasks
from common.adapter import State
from common.config import RunConfig
from common.error import BouquetError
from common.export import export
from common.tasks import Example
from strategies import build, read_config
from tests.architectures import DECODERS, ENCODERS, FAMILIES, VOCABULARY, save

TASKS: Mapping[str, Mapping[str, str]] = {
    "text": {"text": "def get(self, key): return self.found[key] if key else None"},
    "instruct": {"instruction": "Say the word", "output": "word"},
    "classify": {"text": "def get(self): return self", "label": "1"},
}
QUANTISATIONS = ("none", "nf4", "int8")
CELLS = [(family, task, quantisation) for family in FAMILIES for task in TASKS for quantisation in QUANTISATIONS]
# One cell of each kind: every family with every task, and every quantisation, once.
QUICK = [cell for number, cell in enumerate(CELLS) if QUANTISATIONS[(number // 3) % 3] == cell[2]]


@cache
def checkpoint(family: str) -> Path:
    return save(family, Path(mkdtemp()) / family)


def settings(folder: Path, task: str, quantisation: str = "none", **more: Any) -> RunConfig:
    flat = {"model.name": str(folder), "task.name": task, "model.quantization": quantisation, "train.steps": 2}
    return read_config(flat | {"train.batch-size": 4, "task.max-length": 64} | more)


def examples(config: RunConfig) -> list[Example]:
    """Texts of several lengths."""
    task, tokenizer = tasks.build(config.task), base.load_tokenizer(config.model)
    found = []
    for number in range(8):
        record = {name: f"{value} " * (1 + number % 4) for name, value in TASKS[config.task.name].items()}
        found += task.encode(record | {"label": number % 2}, tokenizer)
    return found


def loaded(config: RunConfig) -> models.LoraModel:
    """The model, started as a run would start it."""
    network = base.load(config.model, models.classes(config.task), torch.device("cpu"))
    model = models.LoraModel(network, config.lora)
    state = build(config).initial(model.spec, seed=0)
    model.install(state.adapter, state.scale, {})
    return model


def logits(model: models.LoraModel, task: tasks.Task, example: Example) -> torch.Tensor:
    with torch.no_grad():
        return outputs(model, task.collate([example], 0))[0]


def reloaded(config: RunConfig, folder: Path, example: Example) -> torch.Tensor:
    """What plain PEFT computes, over the base as the run had it."""
    classes = models.classes(config.task)
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": classes} if classes else {}
    if config.model.quantization != "none":
        heads = [key.layer for key in models.describe(config.model, config.lora, config.task).head]
        options["quantization_config"] = base.quantization(config.model.quantization, torch.float32, heads)
    network = PeftModel.from_pretrained(auto.from_pretrained(config.model.name, **options), str(folder)).eval()
    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it would repack the weights, with loss
    tokens = torch.tensor([example.tokens])
    with torch.no_grad():
        return network(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def check_cell(family: str, task_name: str, quantisation: str, folder: Path) -> None:
    config = settings(checkpoint(family), task_name, quantisation)
    task = tasks.build(config.task)
    spec = models.describe(config.model, config.lora, config.task)
    model, chosen = loaded(config), examples(config)
    assert model.spec == spec, "coordinator and node see one model"
    before = logits(model, task, chosen[0])
    trained = train(model, model.keys, task, chosen, config.train, pad=0, seed="1", round=0, rounds=1)
    assert math.isfinite(trained.loss)
    assert math.isfinite(model.score(task, chosen, 0, 4).loss)
    after = logits(model, task, chosen[0])
    assert not torch.equal(before, after)
    export(State(model.tensors(), config.lora.scale, 1), config, folder, with_head=True)
    torch.testing.assert_close(reloaded(config, folder, chosen[0]), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "task", "quantisation"), CELLS)
def test_a_model_trains_and_plain_peft_loads_what_it_leaves(
    family: str, task: str, quantisation: str, tmp_path: Path
) -> None:
    if family in DECODERS or (family in ENCODERS and task == "classify"):
        check_cell(family, task, quantisation, tmp_path)
        return
    said = {
        "t5": "an encoder-decoder cannot be trained here",
        "mamba": "a state-space model|Transformers has no form of this model that classifies",
    }
    with pytest.raises(BouquetError, match=said.get(family, "an encoder cannot learn to continue a text")):
        models.describe(*describing(settings(checkpoint(family), task, quantisation)))


def describing(config: RunConfig) -> tuple[Any, Any, Any]:
    return config.model, config.lora, config.task


PADS = {
    "none": {"pad_token_id": None},
    "another": {"pad_token_id": 5},
    "beyond the vocabulary": {"pad_token_id": VOCABULARY + 3},
}


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_an_examples_loss_is_the_same_alone_and_in_a_batch(family: str, pad: str, tmp_path: Path) -> None:
    """Whatever the checkpoint says of padding. The position of a padding id shifts RoBERTa's own positions."""
    folder = save(family, tmp_path / family)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | PADS[pad]))
    for task_name in ("text", "classify") if family in DECODERS else ("classify",):
        config = settings(folder, task_name)
        base.load_tokenizer.cache_clear()
        task, model, chosen = tasks.build(config.task), loaded(config), examples(config)
        padding = int(base.load_tokenizer(config.model).pad_token_id)
        with torch.no_grad():
            together = task.losses(*outputs(model, task.collate(chosen, padding)))
            alone = torch.cat([task.losses(*outputs(model, task.collate([each], padding))) for each in chosen])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
