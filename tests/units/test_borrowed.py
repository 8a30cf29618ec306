"""Which PEFT models can be borrowed: those that are one plain LoRA, and the rest is refused by name."""

from dataclasses import replace

import peft
import pytest
import torch

from common.adapter.values import Key
from common.config.run import LoraConfig, ModelConfig
from common.error import RefusalError
from common.models import base
from common.models.adapted import LoraModel
from common.models.borrowed import borrow
from tests.support.architectures import save

PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def network(tmp_path):
    return base.load(ModelConfig(name=str(save("llama", tmp_path)), quantization="none"), 0, torch.device("cpu"))


def two(network):
    model = peft.get_peft_model(network, peft.LoraConfig(**PLAIN))
    model.add_adapter("other", peft.LoraConfig(**PLAIN))
    return model


def adapted(**changes):
    return lambda network: peft.get_peft_model(network, peft.LoraConfig(**PLAIN | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda network: network, r"without an adapter \(peft_config\): expected a PEFT model, got LlamaForCausalLM"),
        (two, r"not exactly one adapter \(peft_config\): expected 'default', got default, other"),
        (
            adapted(use_dora=True),
            r"not plain LoRA \(peft_config\): .*got LORA, a different one at \S+q_proj, .* and 1 more",
        ),
        (adapted(target_modules=["q_proj", "embed_tokens"]), r"not plain LoRA .*embed_tokens"),
        (adapted(modules_to_save=["lm_head"]), r"more than an adapter is trained \(requires_grad\): .*got \S+lm_head"),
        (adapted(rank_pattern={"q_proj": 2}), r"different ranks or scales .*got rank 2 at scale 4, rank 4 at scale 2"),
        (
            lambda network: peft.get_peft_model(
                network, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
            ),
            "not plain LoRA .*got IA3",
        ),
    ],
)
def test_what_is_not_one_plain_lora_is_refused_by_name(make, message, network):
    with pytest.raises(RefusalError, match=message):
        borrow(make(network))


def test_a_16_bit_adapter_becomes_float32(network):
    model = adapted()(network)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in borrow(model).live(borrow(model).keys).values()} == {torch.float32}


def test_another_base_is_refused(network, tmp_path):
    model = borrow(adapted()(network))
    own = ModelConfig(name=str(tmp_path), quantization="none")
    model.check(model.spec, own)
    with pytest.raises(
        RefusalError, match=r"a base model other than the run's \(model.name\): expected embedded, got /"
    ):
        model.check(model.spec, ModelConfig(quantization="none"))
    model.resize(dict.fromkeys(model.layers, 2))  # a smaller rank in a run does not make it another model for the next
    model.check(replace(model.spec, rank=4), own)


def test_it_computes_what_bouquets_own_model_does_over_an_offset_too(network, tmp_path):
    config = ModelConfig(name=str(tmp_path), quantization="none")
    own = LoraModel(base.load(config, 0, torch.device("cpu")), LoraConfig(rank=4, alpha=8, targets="q_proj,v_proj"))
    borrowed = borrow(adapted()(network))
    assert borrowed.spec == own.spec
    tensors = {key: torch.randn(shape) / 8 for key, shape in own.spec.factor_shapes().items()}
    shapes = own.spec.layers
    offset = {Key(layer, "Q"): torch.randn(shapes[layer].d_out, 2) / 8 for layer in shapes}
    offset |= {Key(layer, "P"): torch.randn(2, shapes[layer].d_in) / 8 for layer in shapes}
    batch = {name: torch.tensor([[1, 5, 9, 7]]) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones(1, 4, dtype=torch.long)
    for model in (own, borrowed):
        model.install(tensors, 2.0, offset)
        model.network.eval()
    torch.testing.assert_close(borrowed.outputs(batch).values, own.outputs(batch).values)
    trained = borrowed.train_only(borrowed.keys)
    assert [id(p) for p in borrowed.network.parameters() if p.requires_grad] == [id(p) for p in trained]
