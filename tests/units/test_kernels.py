"""How a machine computes: by another attention or compiled a model gives what it gave, or is refused with a cure."""

import os
import re
import subprocess
import sys

import pytest
import torch
import transformers as tf

from client_app.session import Session
from common.config.node import NodeConfig
from common.config.run import LoraConfig
from common.config.section import ConfigError
from common.error import RefusalError
from common.models import kernels
from common.models.adapted import LoraModel
from tests.support import ROOT
from tests.support.grid import OPEN, simulated_nodes
from tests.support.private_runs import PRIVATE
from tests.support.private_steps import EXAMPLES, TEXT, fresh, scattered


def node(**settings) -> NodeConfig:
    return NodeConfig.from_flower({"device": "cpu", **settings})


def figures(model: LoraModel, padded: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of a batch of texts of several lengths, and every gradient."""
    model.network.train()
    model.train_only(model.keys)
    batch = TEXT.collate(EXAMPLES, model.pad)
    if padded:
        with model.padded():
            output = model.outputs(batch)
    else:
        output = model.outputs(batch)
    losses = TEXT.losses(output)
    losses.sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for key in model.keys for parameter in model.parameters(key)])
    model.network.zero_grad(set_to_none=True)
    return losses.detach(), gradients


def test_torchs_attention_by_its_name_is_what_is_taken_anyway():
    model = fresh("none")
    before = figures(model)
    kernels.choose(model, node(attention="sdpa"))
    assert all(map(torch.equal, before, figures(model)))


def test_a_model_without_torchs_attention_says_so():
    network = tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    model = LoraModel(network, LoraConfig.model_validate({"targets": "query_proj"}))
    said = r"cannot compute with \(attention = 'sdpa', .*expected one that the model supports, got .*DebertaV2.*'auto'"
    with pytest.raises(RefusalError, match=said):
        kernels.choose(model, node(attention="sdpa"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_flash_without_a_gpu_is_refused_at_the_roll_call_with_the_cure(settings):
    (context,) = simulated_nodes(1, 1, settings(**{"data.partition": "none"})).values()
    context.node_config |= {"attention": "flash", "policy": OPEN}
    said = (
        "that this machine cannot compute with (attention = 'flash', of the node's config): expected a CUDA "
        "device, and flash-attn built for it and for this torch, got a CPU. Install what is missing, or set attention"
    )
    with pytest.raises(RefusalError, match=re.escape(said)):
        Session(context).answer_roll_call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_ligers_kernels_without_a_gpu_are_refused_with_the_cure():
    said = r"kernels = 'liger', .*expected a CUDA device, and liger-kernel with Triton, got a CPU. .* kernels = 'auto'"
    with pytest.raises(RefusalError, match=said):
        kernels.check(node(kernels="liger"))


@pytest.mark.exhaustive  # compiling takes a minute, and several on a busy machine
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_what_they_gave_packed_and_padded(checkpointing):
    torch.manual_seed(0)
    width = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    network = tf.LlamaForCausalLM(tf.LlamaConfig(**width, num_attention_heads=4, num_key_value_heads=2))
    if checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    model = scattered(LoraModel(network, LoraConfig.model_validate({"rank": 4, "alpha": 4.0})))
    ways = [False] if checkpointing else [False, True]
    plain = [figures(model, padded) for padded in ways]
    kernels.choose(model, node(compile=True))
    for wanted, padded in zip(plain, ways, strict=True):
        for one, other in zip(wanted, figures(model, padded), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1


@pytest.mark.exhaustive  # it tries to compile
def test_a_machine_without_a_compiler_is_refused_with_the_cure(tmp_path):
    script = (
        "from common.config.node import NodeConfig\nfrom common.models import kernels\n"
        "kernels.check(NodeConfig.from_flower({'device': 'cpu', 'compile': True}))"
    )
    own = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, check=False
    )
    said = ran.stderr.strip().splitlines()[-1]
    assert "RefusalError: this machine cannot compile a model (compile, of the node's config): expected a C++" in said
    assert said.endswith("Install it, or set compile = false.")


def test_a_run_that_looks_into_the_blocks_takes_no_compiled_ones(settings):
    (context,) = simulated_nodes(1, 1, settings(**PRIVATE, **{"data.partition": "none"})).values()
    context.node_config["compile"] = True
    said = "compiled blocks hide the gradients of single examples .*expected false in a run with privacy.mode"
    with pytest.raises(RefusalError, match=said):
        Session(context)


def test_a_scripts_model_is_computed_as_the_script_has_it():
    for setting in ({"compile": True}, {"attention": "sdpa"}, {"kernels": "liger"}):
        with pytest.raises(ConfigError, match="attention, compile, kernels: expected none with a script"):
            node(script="/srv/notes.py", **setting)
