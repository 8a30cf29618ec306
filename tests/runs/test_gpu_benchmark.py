"""The benchmark for a GPU, at toy size on whatever is here."""

import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks.gpu import KINDS, SIZES, Steps, main, random_llama
from tests.support.outputs import of_tokens

# TRL about Transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")


def test_both_sides_train_the_same_model_on_the_same_tokens():
    steps = Steps(SIZES["toy"], torch.device("cpu"), 2, 16, checkpointing=False)
    network, bare = steps.bench.model.network, steps.bare.network
    assert isinstance(network.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer, Linear4bit)
    trained = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (network, bare)]
    assert trained[0] == trained[1] > 0
    logits = network(**_inputs(steps)).logits
    ours = steps.bench.task.loss(of_tokens(logits, steps.bench.batch["labels"]))
    torch.testing.assert_close(bare(**steps.bare.batch).loss, ours)
    assert steps.trl["TRL"].loss() == pytest.approx(float(ours.detach()), rel=1e-5)
    for step in steps.trl.values():
        before = step.loss()
        step()
        assert step.loss() < before


def _inputs(steps):
    return {name: steps.bench.batch[name] for name in ("input_ids", "attention_mask")}


def test_the_weights_are_random_and_repeatable():
    one, two = (random_llama(SIZES["toy"], torch.device("cpu")) for _ in range(2))
    other = random_llama(SIZES["toy"], torch.device("cpu"), seed=1)
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(one(tokens).logits, two(tokens).logits)
    assert not torch.allclose(one(tokens).logits, other(tokens).logits)


def test_a_line_for_every_kind_of_step(capsys):
    assert main(["--size", "toy", "--examples", "2", "--tokens", "16", "--repeats", "1"]) == 0
    lines = re.findall(r"\| toy \| ([\w -]+) \| [\d,]+ \| [\d,]+ \| \d\.\d\d \|", capsys.readouterr().out)
    assert lines == [kind for kind in KINDS if kind != "padding-free" or is_flash_attn_2_available()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_large_sizes_are_not_tried(capsys):
    assert main([]) == 2
    assert "--size toy runs on a CPU" in capsys.readouterr().err
