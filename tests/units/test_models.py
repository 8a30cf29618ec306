"""The base and its adapter: quantised once, never written to, and read by plain PEFT."""

import hashlib
import json
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from client_app.training import Turn, schedule, steps_in_round, train
from common import tasks
from common.adapter.structures import stacked
from common.adapter.values import Key, State, Update
from common.config.run import LoraConfig, ModelConfig, RunConfig, TaskConfig, TrainConfig
from common.error import BouquetError
from common.models import adapted, base, embedded, placement
from common.record.export import export
from common.tasks import Example
from strategies.objectives import FedProx, Plain
from strategies.rules import FedExLora, FedIT
from tests.support.architectures import tiny_bert
from tests.support.factors import initial
from tests.support.outputs import of_tokens
from tests.support.training import recipe_of, train_plainly

LORA = LoraConfig()
TEXT = TaskConfig()
EXAMPLES = [Example([1, *range(10 + i, 40 + i)], [1, *range(10 + i, 40 + i)]) for i in range(16)]


def fresh(quantization: str = "nf4", lora: LoraConfig = LORA, **settings: object) -> adapted.LoraModel:
    model = ModelConfig.model_validate({"quantization": quantization, **settings})
    return adapted.LoraModel(base.load(model, 0, torch.device("cpu")), lora)


def base_digest(model: adapted.LoraModel) -> str:
    """SHA-256 over everything that is neither adapter nor head."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        if "lora_" not in name:
            sha.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def start(model: adapted.LoraModel, seed: int = 0) -> State:
    state = initial(FedIT(), model.spec, seed)
    model.install(state.adapter, state.scale, {})
    return state


def train_a_little(model: adapted.LoraModel, keys: list[Key] | None = None, steps: int = 4) -> float:
    config = TrainConfig.model_validate({"steps": steps, "batch-size": 4, "learning-rate": 0.01})
    task = tasks.build(TEXT)
    return train_plainly(model, task, EXAMPLES, config, keys or ()).loss


def random_state(model: adapted.LoraModel) -> State:
    """A state with an offset whose every factor matters."""
    rule = FedExLora()
    state = initial(rule, model.spec)
    generator = torch.Generator().manual_seed(1)

    def update(key: Key, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)

    updates = [Update({k: update(k, t) for k, t in state.adapter.items()}, 1.0, state.scale) for _ in range(3)]
    return rule.aggregate(state, updates)


@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", Linear4bit), ("int8", Linear8bitLt), ("none", torch.nn.Linear)]
)
def test_every_quantisation_learns_and_leaves_the_base_alone(quantization, kind):
    model = fresh(quantization)
    assert isinstance(model.network.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer, kind)
    if quantization == "nf4":
        weight = model.network.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested
    start(model)
    before, task = base_digest(model), tasks.build(TEXT)
    loss = model.score(task, EXAMPLES, 4).loss
    train_a_little(model, steps=6)
    assert model.score(task, EXAMPLES, 4).loss < 0.8 * loss
    assert base_digest(model) == before


def test_an_evaluation_does_not_spoil_the_next_training():
    """On CPUs with bfloat16 units, bitsandbytes would repack the weights and drop the gradient."""
    plain, evaluated = fresh(), fresh()
    losses = []
    for model in (plain, evaluated):
        start(model)
        if model is evaluated:
            model.score(tasks.build(TEXT), EXAMPLES, 4)
        train_a_little(model)
        losses.append({key: tensor.sum().item() for key, tensor in model.tensors().items()})
    assert losses[0] == losses[1]


def test_two_loads_of_one_model_are_equal_to_the_bit():
    assert base_digest(fresh()) == base_digest(fresh())


def test_the_server_knows_the_shapes_without_the_weights():
    assert adapted.describe(ModelConfig(), LORA, TEXT) == fresh().spec
    assert len(fresh().spec.layers) == 6 * 7


def test_only_what_is_named_is_trained():
    model = fresh()
    start(model)
    before = model.tensors()
    train_a_little(model, [key for key in model.keys if key.part == "B"])
    for key, tensor in model.tensors().items():
        assert torch.equal(tensor, before[key]) == (key.part == "A")


def test_checkpointing_and_accumulation_change_nothing_but_memory():
    plain, checkpointed = fresh("none"), fresh("none", **{"gradient-checkpointing": True})
    for model in (plain, checkpointed):
        start(model)
        train_a_little(model)
    for key, tensor in plain.tensors().items():
        torch.testing.assert_close(tensor, checkpointed.tensors()[key], rtol=1e-4, atol=1e-5)


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


def test_the_schedule_spans_all_rounds():
    config = TrainConfig.model_validate({"warmup": 0.1, "schedule": "cosine"})
    factor = schedule(config, 100)
    assert factor(0) < factor(5) < factor(10) == 1.0
    assert factor(99) < 0.01
    assert schedule(TrainConfig.model_validate({"schedule": "constant", "warmup": 0.0}), 10)(9) == 1.0
    assert schedule(TrainConfig.model_validate({"schedule": "linear", "warmup": 0.0}), 10)(5) == 0.5


def test_a_proximal_term_keeps_the_factors_near_where_they_started():
    moved = []
    for mu in (0.0, 100.0):
        model = fresh()
        before = start(model).adapter
        config = TrainConfig.model_validate({"steps": 8, "batch-size": 4, "learning-rate": 0.005, "clip-norm": 0.0})
        recipe = recipe_of(config, objective=FedProx(mu=mu) if mu else Plain())
        train(model, recipe, tasks.build(TEXT), EXAMPLES, Turn(0, model.keys, seed="s"))
        moved.append(sum(float((tensor - before[key]).square().sum()) for key, tensor in model.tensors().items()))
    assert 0 < moved[1] < 0.5 * moved[0]


def test_epochs_count_every_example():
    config = TrainConfig.model_validate({"steps": 0, "epochs": 2, "batch-size": 4, "accumulation": 2})
    assert steps_in_round(config, 17) == 6


def test_a_loss_that_is_not_finite_stops_the_round_with_a_reason():
    model = fresh()
    state = start(model)
    model.install({key: tensor * math.nan for key, tensor in state.adapter.items()}, state.scale, {})
    config = TrainConfig.model_validate({"steps": 1, "batch-size": 4})
    with pytest.raises(
        BouquetError, match=r"the training loss is not finite \(round 1, step .*Lower train.learning-rate"
    ):
        train_plainly(model, tasks.build(TEXT), EXAMPLES, config)


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
