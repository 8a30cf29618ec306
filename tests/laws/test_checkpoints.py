"""What a checkpoint says of itself: what it lacks, how it was quantised, and when an answer of it ends."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from client_app.examples import node_examples
from common import tasks
from common.config.node import NodeConfig
from common.config.run import TaskConfig
from common.error import BouquetError
from common.models import base
from common.tasks import Example
from tests.support.architectures import SIZES, TEMPLATE, VOCABULARY, save
from tests.support.loading import checkpoint, loaded, logits, settings


def test_a_model_that_classified_before_gets_a_fresh_last_layer_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint("bert")).save_pretrained(tmp_path)
    model = loaded(settings(tmp_path, "classify"))
    assert {key.layer: shape for key, shape in model.spec.head.items() if key.part == "W"} == {"classifier": (2, 64)}


@pytest.mark.parametrize(("family", "task"), [("llama", "text"), ("bert", "classify")])
def test_a_lost_weight_is_refused_by_name(family: str, task: str, tmp_path: Path) -> None:
    file = save(family, tmp_path / family) / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "layer" in name and name.endswith("weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    config = settings(file.parent, task)
    with pytest.raises(BouquetError, match=f"the checkpoint lacks weights of the model.*no {re.escape(lost)}"):
        base.load(config.model, tasks.classes(config.task), torch.device("cpu"))


def test_a_file_that_is_half_there_or_a_pointer_is_named(tmp_path: Path) -> None:
    file = save("llama", tmp_path / "llama") / "model.safetensors"
    config, whole = settings(file.parent, "text"), file.read_bytes()
    for content, said in (
        (whole[: len(whole) // 2], "a whole safetensors file, got .* bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "got a git-lfs pointer.*git lfs pull",
        ),
    ):
        file.write_bytes(content)
        with pytest.raises(BouquetError, match=f"a weight file cannot be read .{re.escape(str(file))}.*{said}"):
            base.load(config.model, 0, torch.device("cpu"))


def test_one_other_weight_or_word_makes_another_base(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        base.digest.cache_clear()
        base.load_tokenizer.cache_clear()
        return base.digest(settings(folder, "text").model)

    one, other = (save("llama", tmp_path / name) for name in ("one", "other"))
    assert digest(one) == digest(other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert digest(one) != digest(other)
    tokenizer = AutoTokenizer.from_pretrained(one)
    tokenizer.add_tokens(["bouquet"])
    before = digest(one)
    tokenizer.save_pretrained(one)
    assert digest(one) != before


def test_an_answer_ends_where_any_of_template_tokenizer_and_model_says(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama", vocab_size=VOCABULARY + 64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "<|end|>\n")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5], "bos_token_id": 1}))
    base.load_tokenizer.cache_clear()
    network: Any = base.load(settings(folder, "text").model, 0, torch.device("cpu"))
    assert network.generation_config.eos_token_id == [2, 5, len(tokenizer) - 1]


def test_words_that_the_model_lacks_are_refused_unless_they_pad(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    base.load_tokenizer.cache_clear()
    assert base.load_tokenizer(settings(folder, "text").model).pad_token_id == 0
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>", "<|turn|>")
    tokenizer.save_pretrained(folder)
    base.load_tokenizer.cache_clear()
    said = r"words that the model does not have.*below 2,048, got 1 beyond, such as '<\|turn\|>' \(2,049\)"
    with pytest.raises(BouquetError, match=said):
        base.load_tokenizer(settings(folder, "text").model)


def test_a_text_with_a_word_that_the_model_has_not_is_told(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "llama", vocab_size=512)
    (tmp_path / "x.jsonl").write_text('{"text": "def returning self"}\n' * 4)
    base.load_tokenizer.cache_clear()
    config = settings(folder, "text", **{"data.source": str(tmp_path / "x.jsonl"), "data.partition": "none"})
    with pytest.raises(BouquetError, match=r"words that the model does not have.*token ids below 512, got \d+ beyond"):
        node_examples(config.data, NodeConfig(), config.task, config.model, 0, ())


@pytest.mark.parametrize(("saved", "wanted", "said"), [("nf4", "none", "weights in nf4"), ("int8", "nf4", "in int8")])
def test_a_base_that_has_been_quantised_is_told(saved: str, wanted: str, said: str, tmp_path: Path) -> None:
    config = settings(checkpoint("llama"), "text", saved)
    base.load(config.model, 0, torch.device("cpu")).save_pretrained(tmp_path)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path)
    with pytest.raises(BouquetError, match=f"the base model has been quantised already.*{said}"):
        base.load(settings(tmp_path, "text", wanted).model, 0, torch.device("cpu"))
    again = loaded(settings(tmp_path, "text", saved))
    assert math.isfinite(float(logits(again, tasks.build(TaskConfig()), Example([1, 5, 6], [1, 5, 6])).sum()))


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BouquetError, match=r"an adapter is not a base model.*Name its base model"):
        base.location(str(tmp_path))


def test_a_checkpoints_own_code_never_runs_and_nobody_is_asked(tmp_path: Path) -> None:
    file = save("llama", tmp_path / "llama") / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (file.parent / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BouquetError, match=r"the model cannot be loaded.*contains custom code"):
        base.skeleton(settings(file.parent, "text").model, 0)
    assert not (tmp_path / "ran").exists()
