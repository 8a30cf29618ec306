"""The classifier over mean-pooled states: what it computes, learns, exports, and cannot do."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModel

from common import tasks
from common.adapter.values import Key, State
from common.config.run import LoraConfig, ModelConfig, RunConfig, TaskConfig, TrainConfig
from common.error import BouquetError
from common.models import adapted
from common.models.pooling import pool
from common.record.export import export
from common.tasks import Example
from strategies.rules import FedIT
from tests.support.architectures import tiny_bert
from tests.support.factors import initial
from tests.support.training import train_plainly

EXAMPLES = [Example(list(range(3 + i, 12 + 2 * i)), [i % 3]) for i in range(12)]


def pooled(folder, quantization="none"):
    settings = {"model.name": tiny_bert(folder), "model.quantization": quantization, "model.pooling": "mean"}
    config = RunConfig.from_flower(settings | {"task.name": "classify", "task.labels": 3})
    return config, adapted.load(config.model, config.lora, config.task, "cpu")


def test_padding_and_length_do_not_count_and_every_text_has_length_one():
    hidden = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    one = pool(hidden, mask)
    torch.testing.assert_close(one[0], hidden[0, :2].mean(0) / hidden[0, :2].mean(0).norm())
    torch.testing.assert_close(one.norm(dim=1), torch.ones(2))
    assert torch.equal(pool(hidden[:1, :2], mask[:1, :2])[0], one[0])


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_encoder_is_adapted_and_the_head_is_trained(quantization, tmp_path):
    config, model = pooled(tmp_path, quantization)
    assert model.spec == adapted.describe(config.model, config.lora, config.task)
    assert model.spec.head == {Key("classifier", "W"): (3, 64), Key("classifier", "b"): (3,)}
    assert not [layer for layer in model.spec.layers if "pooler" in layer]
    query = model.network.get_submodule("base_model.model.encoder.encoder.layer.0.attention.self.query").base_layer
    assert isinstance(query, Linear4bit) == (quantization == "nf4")
    state = initial(FedIT(), model.spec)
    model.install(state.adapter, state.scale, {})
    task = tasks.build(config.task)
    before = model.score(task, EXAMPLES, 4).loss
    short = TrainConfig.model_validate({"steps": 12, "batch-size": 12, "learning-rate": 0.02})
    train_plainly(model, task, EXAMPLES, short)
    assert model.score(task, EXAMPLES, 4).loss < 0.9 * before


def test_the_head_has_a_rate_of_its_own(tmp_path):
    """Adam's first step is the rate, whatever the gradient."""
    config, model = pooled(tmp_path)
    state = initial(FedIT(), model.spec)
    model.install(state.adapter, state.scale, {})
    before = model.tensors()
    settings = {"steps": 1, "learning-rate": 1e-3, "head-learning-rate": 0.1, "schedule": "constant", "warmup": 0.0}
    task, one_step = tasks.build(config.task), TrainConfig.model_validate(settings)
    train_plainly(model, task, EXAMPLES, one_step)
    moved = {key: float((tensor - before[key]).abs().max()) for key, tensor in model.tensors().items()}
    assert {round(step, 3) for key, step in moved.items() if key in model.spec.head} == {0.1}
    assert {round(step, 4) for key, step in moved.items() if key.part == "B"} == {1e-3}


def test_plain_peft_loads_the_encoder_and_four_lines_make_the_logits(tmp_path):
    config, model = pooled(tmp_path)
    state = initial(FedIT(), model.spec)
    generator = torch.Generator().manual_seed(1)
    adapter = {key: t + 0.05 * torch.randn(t.shape, generator=generator) for key, t in state.adapter.items()}
    model.install(adapter, state.scale, {})
    folder = tmp_path / "adapter"
    export(State(model.tensors(), state.scale), config, folder, with_head=True)

    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(config.model.name), str(folder)).eval()
    head = load_file(folder / "head.safetensors")
    batch = tasks.build(config.task).collate(EXAMPLES, 0)
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        hidden = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        theirs = linear(pool(hidden, mask), head["classifier.weight"], head["classifier.bias"])
        model.network.eval()
        ours = model.logits({"input_ids": tokens, "attention_mask": mask})
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_the_limit_plain_transformers_has_no_such_head_and_says_so(tmp_path):
    config, model = pooled(tmp_path)
    export(initial(FedIT(), model.spec), config, tmp_path / "adapter", with_head=True)
    with pytest.raises(ValueError, match="Expected target PEFT class"):
        AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter"))


def test_a_language_model_has_nothing_to_pool():
    with pytest.raises(BouquetError, match=r"nothing to pool \(model.pooling\): expected 'default', got 'mean' with"):
        adapted.describe(ModelConfig(pooling="mean"), LoraConfig(), TaskConfig())
