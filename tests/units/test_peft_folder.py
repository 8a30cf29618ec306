"""Adapters that PEFT has written, as a run's start: the same model that PEFT loads, or refused by name."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common import tasks
from common.error import BouquetError
from common.models import base, embedded
from common.models.adapted import LoraModel, describe
from common.record import peft_folder
from common.record.export import export
from strategies import Recipe, read_config
from tests.support.adapters import trained
from tests.support.architectures import save, tiny_bert

TOKENS = torch.arange(5, 25)[None]
PLAIN = {"model.quantization": "none", "lora.rank": 4}


def written(folder: Path, network: Any, **settings: Any) -> Any:
    """PEFT's model with a LoRA of random weights, saved in ``folder``."""
    model = peft.get_peft_model(network, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def language(folder: Path, **settings: Any) -> Any:
    network = AutoModelForCausalLM.from_pretrained(embedded.unpack(), dtype=torch.float32)
    return written(folder, network, **{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings})


def started(folder: Path, **settings: Any) -> LoraModel:
    """The model that a run with this adapter starts from."""
    recipe = Recipe.read({**PLAIN, "model.adapter": str(folder), **settings})
    config = recipe.config
    network = base.load(config.model, tasks.classes(config.task), torch.device("cpu"))
    model = LoraModel(network, config.lora, recipe.structure)
    state = recipe.start(model.spec, 0, given=peft_folder.given(config, model.spec))
    model.install(state.adapter, state.scale, state.offset)
    model.network.eval()
    return model


PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 9}, "alpha_pattern": {"down_proj": 3}}


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("fedit", {"lora_alpha": 8}),
        ("fedit", {"r": 3, "lora_alpha": 16, "use_rslora": True}),
        ("fedit", PATTERNS),
        ("flora", PATTERNS),
        ("fed-sb", PATTERNS),
    ],
    ids=["plain", "rslora", "patterns", "restart", "core"],
)
def test_a_run_starts_from_the_model_that_peft_loads(rule, settings, tmp_path):
    theirs = language(tmp_path / "adapter", **settings)
    ours = started(tmp_path / "adapter", **{"rule.name": rule})
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
        torch.testing.assert_close(ours.network(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(input_ids=TOKENS).logits - expected).abs().max() > 0.1


def test_a_transposed_layer_is_read_as_any_other(tmp_path):
    name = str(save("gpt2", tmp_path / "gpt2"))
    network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    theirs = written(tmp_path / "adapter", network, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    ours = started(tmp_path / "adapter", **{"model.name": name})
    with torch.no_grad():
        torch.testing.assert_close(
            ours.network(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-4
        )


def test_a_head_comes_along_and_another_tasks_is_refused(tmp_path):
    name = tiny_bert(tmp_path)
    network = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3, dtype=torch.float32)
    theirs = written(tmp_path / "adapter", network, r=4, target_modules=["query"], task_type="SEQ_CLS")
    classes = {"model.name": name, "task.name": "classify"}
    ours = started(tmp_path / "adapter", **classes, **{"task.labels": 3})
    with torch.no_grad():
        torch.testing.assert_close(
            ours.network(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(BouquetError, match=r"classifier:.*expected shape \(2,.*got shape \(3,"):
        started(tmp_path / "adapter", **classes)


@pytest.mark.parametrize(
    "settings",
    [
        {"rule.name": "fedex-lora"},
        {"rule.name": "ravan"},
        {"task.name": "classify", "model.pooling": "mean", "lora.targets": "query"},
        {"task.name": "classify", "lora.targets": "query"},
    ],
    ids=["offset", "core", "pooled", "head"],
)
def test_an_export_of_ours_is_a_start(settings, tmp_path):
    settings = {**PLAIN, **({"model.name": tiny_bert(tmp_path)} if "task.name" in settings else {}), **settings}
    config = read_config(settings)
    state = trained(config)
    export(state, config, tmp_path / "adapter", with_head=True)
    network = base.load(config.model, tasks.classes(config.task), torch.device("cpu"))
    before = LoraModel(network, config.lora, Recipe.build(config).structure)
    before.install(state.adapter, state.scale, state.offset)
    after = started(tmp_path / "adapter", **settings)
    with torch.no_grad():
        one, two = (
            model.network.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
            for model in (before, after)
        )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def changed(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def renamed(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)


def spoilt(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)


REFUSED = {
    "dora": (
        lambda folder: changed(folder, use_dora=True),
        r"more than a LoRA \(.*adapter_config.json, use_dora\): expected an adapter with only A and B, got True",
    ),
    "bias": (lambda folder: changed(folder, bias="all"), r"more than a LoRA \(.*, bias\)"),
    "what PEFT may bring": (lambda folder: changed(folder, use_novelty=[1]), r"more than a LoRA \(.*, use_novelty\)"),
    "another kind": (
        lambda folder: changed(folder, peft_type="VERA"),
        r"not a LoRA \(.*, peft_type\): expected LORA, got VERA",
    ),
    "another base": (
        lambda folder: changed(folder, init_lora_weights="pissa"),
        r"a base that its initialisation changed .*got pissa. Save it with PEFT's save_pretrained\(",
    ),
    "no rank": (lambda folder: changed(folder, r=0), "the adapter cannot be read .*ZeroDivisionError"),
    "a wrong rank": (
        lambda folder: changed(folder, r=5),
        r"does not fit the run's model \(.*:A\): expected shape \(5, .*got shape \(4, .*Its base is .*embedded",
    ),
    "no list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "the adapter cannot be read"),
    "half a layer": (
        lambda folder: renamed(folder, "layers.0.self_attn.q_proj.lora_B", "layers.0.self_attn.k_proj.lora_B"),
        r"does not fit the run's model \(.*layers.0.self_attn.[qk]_proj:[AB]\): expected shape .*, got none",
    ),
    "layers of another model": (
        lambda folder: renamed(folder, ".layers.", ".blocks."),
        r"layers that the run does not adapt \(.*\): got model.blocks.0.mlp.down_proj, .* and \d+ more. Name them in",
    ),
    "vocabulary": (
        lambda folder: renamed(folder, "q_proj.lora_A.weight", "embed_tokens.lora_embedding_A"),
        "tensors that are not factors of a LoRA .*lora_embedding_A",
    ),
    "whole layers": (
        lambda folder: renamed(folder, "q_proj.lora_A.weight", "lm_head.weight"),
        "tensors beside its factors that the run does not train .*lm_head:W.* Set task.name to the task that it was",
    ),
    "no numbers": (spoilt, r"the adapter .* out of range \(model.layers.*expected values within 1e.06, got nan"),
    "torn": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"1234"),
        "the adapter cannot be read .*SafetensorError",
    ),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"no weights that can be read .*got adapter_model.bin, a pickle, which may run code. If you trust it, load it",
    ),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    language(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_of_the_model_is_refused_by_name(name, adapter, tmp_path):
    spoil, message = REFUSED[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    with pytest.raises(BouquetError, match=message):
        read(str(folder))


def read(name: str, **settings: Any) -> None:
    config = read_config({**PLAIN, "model.adapter": name, **settings})
    peft_folder.given(config, describe(config.model, config.lora, config.task))


def test_a_layer_outside_the_targets_is_refused(adapter):
    with pytest.raises(BouquetError, match=r"does not adapt \(.*down_proj.*Name them in lora.targets"):
        read(str(adapter), **{"lora.targets": "q_proj"})


def test_an_adapter_that_is_not_there_is_told(adapter, tmp_path, monkeypatch):
    with pytest.raises(BouquetError, match=r"no such adapter \(model.adapter\): expected a folder with adapter_config"):
        read(str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/adapter").symlink_to(adapter)
    with pytest.raises(BouquetError, match=rf"A run's own is {tmp_path}/run/adapter."):
        read(str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BouquetError, match=r"expected an absolute path, or a hub id, got run\. Name the folder by its"):
        read("run")
    with pytest.raises(
        BouquetError, match=r"cannot be opened \(model.adapter, .*'some/adapter' at 'v2'.*the hub cache"
    ):
        read("some/adapter", **{"model.adapter-revision": "v2"})
