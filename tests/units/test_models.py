"""The base and its adapter: quantised once, never written to, and read by plain PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from common import tasks
from common.adapter.structures import stacked
from common.adapter.values import Key, State, Update
from common.config.run import LoraConfig, ModelConfig, RunConfig, TrainConfig
from common.error import BouquetError
from common.models import adapted, base, embedded, placement
from common.record.export import export
from common.tasks import Example
from strategies.rules import FedExLora, FedIT
from tests.support.architectures import tiny_bert
from tests.support.embedded import EXAMPLES, LORA, TEXT, base_digest, fresh, start, train_a_little
from tests.support.factors import initial
from tests.support.outputs import of_tokens
from tests.support.training import train_plainly


def random_state(model: adapted.LoraModel) -> State:
    """A state with an offset whose every factor matters."""
    rule = FedExLora()
    state = initial(rule, model.spec)
    generator = torch.Generator().manual_seed(1)

    def update(key: Key, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)

    updates = [Update({k: update(k, t) for k, t in state.adapter.items()}, 1.0, state.scale) for _ in range(3)]
    return rule.aggregate(state, updates)


def test_two_loads_of_one_model_are_equal_to_the_bit():
    assert base_digest(fresh()) == base_digest(fresh())


def test_the_server_knows_the_shapes_without_the_weights():
    assert adapted.describe(ModelConfig(), LORA, TEXT) == fresh().spec
    assert len(fresh().spec.layers) == 6 * 7


def test_the_offset_adds_its_product_and_nothing_learns_it():
    model = fresh("none")
    state = random_state(model)
    model.install(state.adapter, state.scale, state.offset)
    tokens = torch.tensor([EXAMPLES[0].tokens])
    model.network.eval()
    with torch.no_grad():
        shown = model.logits({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    network = AutoModelForCausalLM.from_pretrained(embedded.unpack(), dtype=torch.float32)
    factors = stacked(state)
    with torch.no_grad():
        for layer in state.layers():
            network.get_submodule(layer).weight += factors[Key(layer, "B")] @ factors[Key(layer, "A")]
        torch.testing.assert_close(shown, network.eval()(tokens).logits, rtol=1e-3, atol=1e-3)
    train_a_little(model)
    for name, parameter in model.network.named_parameters():
        if "offset" in name:
            assert not parameter.requires_grad


def test_installing_is_idempotent_and_an_offset_can_grow_and_go():
    model = fresh("none")
    state = random_state(model)
    tokens = torch.tensor([EXAMPLES[0].tokens])
    outputs = []
    for offset in (state.offset, {}, state.offset, state.offset):
        model.install(state.adapter, state.scale, offset)
        model.network.eval()
        with torch.no_grad():
            outputs.append(model.logits({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("with_offset", [False, True])
def test_plain_peft_loads_the_export_and_sees_the_same_loss(with_offset, tmp_path):
    model = fresh("nf4")
    state = random_state(model)
    if not with_offset:
        state = State(state.adapter, state.scale)
    export(state, RunConfig(), tmp_path, with_head=True)
    model.install(state.adapter, state.scale, state.offset)
    ours = model.score(tasks.build(TEXT), EXAMPLES, 4).loss

    plain = base.load(ModelConfig(), 0, torch.device("cpu"))
    loaded = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    batch = tasks.build(TEXT).collate(EXAMPLES, 0)
    with torch.no_grad():
        logits = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    theirs = tasks.build(TEXT).score(of_tokens(logits, batch["labels"])).loss
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_a_state_of_another_model_is_refused():
    model = fresh()
    state = initial(FedIT(), model.spec)
    wrong = {Key(key.layer.replace("q_proj", "qkv"), key.part): tensor for key, tensor in state.adapter.items()}
    with pytest.raises(
        BouquetError, match=r"does not fit this machine's model: 12 missing tensors, such as model.layers.0"
    ):
        model.install(wrong, 1.0, {})
    with pytest.raises(BouquetError, match=r"expected shape \(8, 128\), got shape \(4, 128\)"):
        model.install({k: t[:4] if k.part == "A" else t for k, t in state.adapter.items()}, 1.0, {})


def test_targets_that_no_layer_has_are_refused():
    with pytest.raises(
        BouquetError, match=r"no such layer \(lora.targets\): expected 'all-linear' or some of .*q_proj.*got query"
    ):
        adapted.describe(ModelConfig(), LoraConfig(targets="q_proj,query"), TEXT)


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "nobody/nothing"])
def test_a_missing_model_is_named(name):
    with pytest.raises(BouquetError, match=r"\(model.name\)"):
        base.skeleton(ModelConfig(name=name), 0)


def test_an_unknown_device_is_refused():
    with pytest.raises(BouquetError, match=r"an unknown device \(device\): expected auto, cpu or cuda:0, got gpu"):
        placement.find_device("gpu")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_head_is_trained_shipped_and_loaded_by_plain_peft(quantization, tmp_path):
    settings = {
        "model.name": tiny_bert(tmp_path),
        "model.quantization": quantization,
        "task.name": "classify",
        "task.labels": 3,
        "lora.targets": "query,value",
    }
    config = RunConfig.from_flower(settings)
    model = adapted.load(config.model, config.lora, config.task, "cpu")
    assert model.spec == adapted.describe(config.model, config.lora, config.task)
    assert model.spec.head == {Key("classifier", "W"): (3, 64), Key("classifier", "b"): (3,)}
    state = initial(FedIT(), model.spec)
    model.install(state.adapter, state.scale, {})
    examples = [Example(list(range(3 + i, 20 + i)), [i % 3]) for i in range(12)]
    task = tasks.build(config.task)
    short = TrainConfig.model_validate({"steps": 3, "batch-size": 4, "learning-rate": 5e-3})
    train_plainly(model, task, examples, short)
    after = State(model.tensors(), state.scale, 1)
    assert not torch.equal(after.adapter[Key("classifier", "W")], state.adapter[Key("classifier", "W")])

    export(after, config, tmp_path / "adapter", with_head=True)
    plain = base.load(config.model, 3, torch.device("cpu"))
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    batch = task.collate(examples, 0)
    with torch.no_grad():
        theirs = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        model.network.eval()
        ours = model.logits(batch)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_layers_that_store_their_weight_transposed_are_adapted_right(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    model = ModelConfig(name=str(tmp_path), quantization="none")
    spec = adapted.describe(model, LORA, TEXT)
    assert spec.layers["transformer.h.0.attn.c_attn"] == (96, 32)
    model = adapted.LoraModel(base.load(model, 0, torch.device("cpu")), LORA)
    start(model)
    first = model.score(tasks.build(TEXT), EXAMPLES, 4).loss
    train_a_little(model)
    assert model.score(tasks.build(TEXT), EXAMPLES, 4).loss < first


def test_the_embedded_weights_make_the_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    embedded.write_weights(tensors, tmp_path / "w.jsonl")
    for name, tensor in embedded.read_weights(tmp_path / "w.jsonl").items():
        assert torch.equal(tensor, tensors[name].half().float())


def test_the_embedded_model_is_unpacked_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = embedded.unpack()
    assert folder == embedded.unpack()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    size = sum((embedded.FOLDER / name).stat().st_size for name in embedded.FILES)
    assert size < 6_000_000
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 2048
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def test_an_adapter_that_cannot_be_put_on_costs_the_base_nothing():
    """What was worn before is off by then, and is put on anew when it is asked for."""
    config = ModelConfig.model_validate({"quantization": "none"})
    for targets in ("q_proj", "no_such_layer", "q_proj"):
        wanted = LoraConfig.model_validate({"targets": targets})
        if targets == "no_such_layer":
            with pytest.raises(BouquetError, match="the model has no such layer"):
                adapted.load(config, wanted, TEXT, "cpu")
            continue
        model = adapted.load(config, wanted, TEXT, "cpu")
        model.train_only(model.keys)
        assert model.outputs(tasks.build(TEXT).collate(EXAMPLES, model.pad)).values.requires_grad
    assert adapted.load(config, wanted, TEXT, "cpu") is model
