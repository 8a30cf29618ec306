"""The models that people bring: each trains, scores, exports and loads in plain PEFT, or is refused in a sentence."""

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from common import tasks
from common.adapter.values import Key, State
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import adapted, base, head
from common.models.coverage import coverage
from common.record.export import export
from common.tasks import Example
from strategies import Recipe
from tests.support.architectures import DECODERS, ENCODERS, FAMILIES, VOCABULARY, save
from tests.support.cells import each
from tests.support.loading import checkpoint, loaded, logits, settings
from tests.support.outputs import of_tokens
from tests.support.training import train_plainly

TASKS: Mapping[str, Mapping[str, str]] = {
    "text": {"text": "def get(self, key): return self.found[key] if key else None"},
    "instruct": {"instruction": "Say the word", "output": "word"},
    "classify": {"text": "def get(self): return self", "label": "1"},
    "embed": {"anchor": "def get(self): return self", "positive": "the getter", "negative": "raise KeyError(key)"},
}
QUANTISATIONS = ("none", "nf4", "int8")
CELLS = [(family, task, quantisation) for family in FAMILIES for task in TASKS for quantisation in QUANTISATIONS]
# One cell of each kind: every family with every task, and every quantisation, once.
QUICK = [cell for number, cell in enumerate(CELLS) if QUANTISATIONS[(number // 3) % 3] == cell[2]]


def examples(config: RunConfig) -> list[Example]:
    """Texts of several lengths."""
    task, tokenizer = tasks.build(config.task), base.load_tokenizer(config.model)
    found = []
    for number in range(8):
        record = {name: f"{value} " * (1 + number % 4) for name, value in TASKS[config.task.name].items()}
        found += task.encode(record | {"label": number % 2}, tokenizer)
    return found


def reloaded(config: RunConfig, folder: Path, example: Example) -> torch.Tensor:
    """What plain PEFT computes, over the base as the run had it."""
    classes = tasks.classes(config.task)
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM if classes == 0 else AutoModel
    options: dict[str, Any] = {"num_labels": classes} if classes else {}
    if config.model.quantization != "none":
        heads = [key.layer for key in adapted.describe(config.model, config.lora, config.task).head]
        # What Transformers draws anew cannot be loaded in 4 bits.
        heads = ["pooler"] if classes is None else heads
        options["quantization_config"] = base.quantization(config.model.quantization, torch.float32, heads)
    network = PeftModel.from_pretrained(auto.from_pretrained(config.model.name, **options), str(folder)).eval()
    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it would repack the weights, with loss
    tokens = torch.tensor([example.tokens])
    with torch.no_grad():
        output = network(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if classes is not None:
        return output.logits
    hidden = output.last_hidden_state
    return normalize(hidden.mean(1) if config.model.name.endswith(tuple(ENCODERS)) else hidden[:, -1], dim=-1)


def check_cell(family: str, task_name: str, quantisation: str, folder: Path) -> None:
    config = settings(checkpoint(family), task_name, quantisation)
    task = tasks.build(config.task)
    spec = adapted.describe(config.model, config.lora, config.task)
    model, chosen = loaded(config), examples(config)
    assert model.spec == spec, "coordinator and node see one model"
    before = logits(model, task, chosen[0])
    trained = train_plainly(model, task, chosen, config.train)
    assert math.isfinite(trained.loss)
    assert math.isfinite(model.score(task, chosen, 4).loss)
    after = logits(model, task, chosen[0])
    assert not torch.equal(before, after)
    if task.language:
        batch = task.collate(chosen, 0)
        with torch.no_grad():
            ours, dense = model.outputs(batch), of_tokens(model.logits(batch), batch["labels"])
        torch.testing.assert_close(ours.values, dense.values, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.right, dense.right)
    export(State(model.tensors(), config.lora.scale, 1), config, folder, with_head=True)
    torch.testing.assert_close(reloaded(config, folder, chosen[0]), after[:1], rtol=1e-3, atol=1e-4)


# A decoder and an encoder, and each quantisation, once.
KEPT = {("llama", "nf4"), ("gpt2", "int8"), ("bert", "none")}


@pytest.mark.parametrize(
    ("family", "quantisation"),
    each(
        (cell for cell in product((*DECODERS, *ENCODERS), QUANTISATIONS) if cell != ("deepseek", "int8")),
        KEPT,
    ),
)
def test_a_base_that_has_worn_one_adapter_is_to_the_next_what_it_was(family: str, quantisation: str) -> None:
    """To the bit: a run trains the same adapter, whatever a process has run before."""
    task_name = "text" if family in DECODERS else "classify"
    before = settings(checkpoint(family), task_name, quantisation)
    config = settings(checkpoint(family), task_name, quantisation, **{"lora.rank": 4, "lora.dropout": 0.1})

    def trained(model: adapted.LoraModel, config: RunConfig) -> dict[Key, torch.Tensor]:
        state = Recipe.build(config).start(model.spec, seed=0)
        model.install(state.adapter, state.scale, state.offset)
        train_plainly(model, tasks.build(config.task), examples(config), config.train)
        return model.tensors()

    fresh = trained(loaded(config), config)
    trained(first := adapted.load(before.model, before.lora, before.task, "cpu"), before)
    again = adapted.load(config.model, config.lora, config.task, "cpu")
    assert again.network.base_model.model is first.network.base_model.model, "the base is not loaded anew"
    assert {key: torch.equal(tensor, fresh[key]) for key, tensor in trained(again, config).items()} == dict.fromkeys(
        fresh, True
    )


@pytest.mark.parametrize(
    ("family", "task", "quantisation"),
    each(CELLS, QUICK),
)
def test_a_model_trains_and_plain_peft_loads_what_it_leaves(
    family: str, task: str, quantisation: str, tmp_path: Path
) -> None:
    if (family, quantisation) == ("deepseek", "int8"):
        # bitsandbytes' own int8 product fails on the shape of its attention.
        with pytest.raises(BouquetError, match="the model, as loaded, cannot process a text"):
            loaded(settings(checkpoint(family), task, quantisation))
        return
    if family in DECODERS or (family in ENCODERS and task in ("classify", "embed")):
        check_cell(family, task, quantisation, tmp_path)
        return
    said = {
        "t5": "an encoder-decoder cannot be trained here",
        "mamba": "a state-space model|Transformers has no form of this model that classifies",
    }
    with pytest.raises(BouquetError, match=said.get(family, "an encoder cannot learn to continue a text")):
        adapted.describe(*describing(settings(checkpoint(family), task, quantisation)))


def describing(config: RunConfig) -> tuple[Any, Any, Any]:
    return config.model, config.lora, config.task


PADS = {
    "none": {"pad_token_id": None},
    "another": {"pad_token_id": 5},
    "beyond the vocabulary": {"pad_token_id": VOCABULARY + 3},
}


@pytest.mark.parametrize(
    ("family", "pad"),
    [
        pytest.param(family, pad, marks=[] if number % len(PADS) == place else pytest.mark.exhaustive)
        for number, family in enumerate([*DECODERS, *ENCODERS])
        for place, pad in enumerate(PADS)
    ],
)
def test_an_examples_loss_is_the_same_alone_and_in_a_batch(family: str, pad: str, tmp_path: Path) -> None:
    """Whatever the checkpoint says of padding. The position of a padding id shifts RoBERTa's own positions."""
    folder = save(family, tmp_path / family)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | PADS[pad]))
    for task_name in ("text", "classify", "embed") if family in DECODERS else ("classify", "embed"):
        config = settings(folder, task_name)
        base.load_tokenizer.cache_clear()
        task, model, chosen = tasks.build(config.task), loaded(config), examples(config)
        padding = int(base.load_tokenizer(config.model).pad_token_id)
        with torch.no_grad():
            together = task.losses(model.outputs(task.collate(chosen, padding)))
            alone = torch.cat([task.losses(model.outputs(task.collate([each], padding))) for each in chosen])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral", "bert", "electra"])
def test_the_shares_that_a_run_tells_are_those_of_the_loaded_model(family: str) -> None:
    config = settings(checkpoint(family), "classify", "nf4")
    model = loaded(config)
    skeleton = base.skeleton(config.model, tasks.classes(config.task))
    heads = {key.layer for key in model.spec.head}
    whole = sum(p.numel() for name, p in skeleton.named_parameters() if name.rpartition(".")[0] not in heads)
    in_four_bits = [module for module in model.network.modules() if isinstance(module, Linear4bit)]
    quantised = sum(math.prod(module.weight.quant_state.shape) for module in in_four_bits)
    covered = sum(shape.d_out * shape.d_in for shape in model.spec.layers.values())
    told = coverage(skeleton, model.spec.layers, "nf4")
    assert told.quantised == pytest.approx(quantised / whole)
    assert told.adapted == pytest.approx(covered / whole)


HEADS = {
    "bert": ["bert.pooler.dense", "classifier"],
    "deberta": ["pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
    "modernbert": ["classifier"],
    "llama": ["score"],
}


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
@pytest.mark.parametrize("family", HEADS)
def test_what_a_checkpoint_lacks_is_neither_adapted_nor_quantised(family: str, quantisation: str) -> None:
    model = loaded(settings(checkpoint(family), "classify", quantisation))
    assert list(dict.fromkeys(key.layer for key in model.spec.head)) == HEADS[family]
    assert not [layer for layer in model.spec.layers if head.inside(layer, HEADS[family])]
    for key in model.spec.head:
        assert model.parameters(key)[0].dtype == torch.float32, key


def test_experts_are_left_out_and_named_where_they_are_asked_for() -> None:
    config = settings(checkpoint("mixtral"), "text", **{"lora.targets": "q_proj,gate_up_proj"})
    with pytest.raises(BouquetError, match=r"the model's experts cannot be adapted.*got gate_up_proj, weights of all"):
        adapted.describe(config.model, config.lora, config.task)


def test_the_texts_of_a_pair_are_told_apart_as_in_transformers() -> None:
    config = settings(checkpoint("bert"), "classify", **{"task.text-pair": "second"})
    task, tokenizer, model = tasks.build(config.task), base.load_tokenizer(config.model), loaded(config)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    (pair,) = task.encode({"text": "def get", "second": "return self", "label": 1}, tokenizer)
    if not any(pair.segments):  # the embedded tokenizer has one segment; a BERT's has two
        half = len(pair.tokens) // 2
        pair = pair._replace(segments=[0] * half + [1] * (len(pair.tokens) - half))
    inputs = {"input_ids": pair.tokens, "token_type_ids": pair.segments}
    with torch.no_grad():
        plain = model.network(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits
    assert torch.equal(logits(model, task, pair), plain)
    assert not torch.equal(logits(model, task, pair._replace(segments=())), plain)
