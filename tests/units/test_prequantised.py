"""Bases that were quantised before they came here: trained on as they are, or refused with what helps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common import tasks
from common.adapter.values import Key
from common.error import BouquetError
from common.models import base
from common.models.adapted import LoraModel
from strategies import Recipe, read_config
from tests.support.architectures import save
from tests.support.grid import run_in_process

BLOCK = 32
CPU = torch.device("cpu")


def four_bits(folder: Path, **options: Any) -> Path:
    """A checkpoint as others publish it, saved by bitsandbytes in four bits."""
    plain = save("llama", folder / "plain")
    kind = BitsAndBytesConfig(load_in_4bit=True, **options)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=kind, device_map="cpu").save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder


def eight_bits(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in fp8 with a scale a block, as DeepSeek publishes its own; and the weights that it stands for."""
    save("llama", folder)
    file = folder / "model.safetensors"
    stored, meant = {}, {}
    for name, tensor in load_file(file).items():
        if "_proj" not in name:
            stored[name] = meant[name] = tensor
            continue
        blocks = tensor.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
        small = (blocks / scale).to(torch.float8_e4m3fn)
        meant[name] = (small.float() * scale).reshape(tensor.shape)
        stored[name], stored[f"{name}_scale_inv"] = small.reshape(tensor.shape), scale[:, 0, :, 0].contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    told(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
    return folder, meant


def told(folder: Path, **quantization: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


def load(folder: Path, **settings: Any) -> Any:
    config = read_config({"model.name": str(folder), **settings})
    return base.load(config.model, tasks.classes(config.task), CPU)


def learns(folder: Path, settings: Any, **changes: Any) -> None:
    flat = {
        "model.name": str(folder),
        "train.learning-rate": 0.02,
        "train.steps": 6,
        "task.max-length": 16,
        "evaluation.every": 0,
    }
    run_in_process(settings(**flat, **changes), nodes=2)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["after"]["all"] < 0.98 * summary["before"]["all"]


@pytest.mark.slow
def test_a_base_saved_in_nf4_is_trained_on(tmp_path, settings):
    folder = four_bits(tmp_path, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    network = load(folder)
    layers = [module for module in network.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert all(layer.compute_dtype == torch.float32 for layer in layers)
    learns(folder, settings)


def test_a_classifiers_head_is_not_in_four_bits(tmp_path):
    folder = four_bits(tmp_path, bnb_4bit_quant_type="nf4")
    network = load(folder, **{"task.name": "classify", "task.labels": 3})
    assert type(network.score) is torch.nn.Linear
    assert network.score.weight.shape == (3, 64)


def test_four_bits_of_another_type_are_told(tmp_path):
    folder = four_bits(tmp_path, bnb_4bit_quant_type="fp4")
    with pytest.raises(BouquetError, match=r"quantised already .*got weights in fp4. Name the unquantised base"):
        load(folder)


@pytest.mark.slow
def test_a_base_saved_in_fp8_is_widened_and_trained_on(tmp_path, settings):
    folder, meant = eight_bits(tmp_path)
    weights = load(folder, **{"model.quantization": "fp8"}).state_dict()
    for name, tensor in meant.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-2, atol=1e-6)
    learns(folder, settings, **{"model.quantization": "fp8"})


def whole_bytes(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in int8 with a scale a row, as llm-compressor writes it; and the weights that it stands for."""
    save("llama", folder)
    file = folder / "model.safetensors"
    stored, meant = {}, {}
    for name, tensor in load_file(file).items():
        stored[name] = meant[name] = tensor
        if "_proj" in name:
            stored[f"{name}_scale"] = scale = tensor.abs().amax(1, keepdim=True) / 127
            stored[name] = (tensor / scale).round().to(torch.int8)
            meant[name] = stored[name].float() * scale
    save_file(stored, file, metadata={"format": "pt"})
    kind = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": kind}}
    told(folder, quant_method="compressed-tensors", format="int-quantized", config_groups=groups, ignore=["lm_head"])
    return folder, meant


@pytest.mark.slow
def test_a_base_saved_by_compressed_tensors_is_widened_and_trained_on(tmp_path, settings):
    pytest.importorskip("compressed_tensors")
    folder, meant = whole_bytes(tmp_path)
    weights = load(folder, **{"model.quantization": "compressed-tensors"}).state_dict()
    for name, tensor in meant.items():
        assert torch.equal(weights[name], tensor)
    learns(folder, settings, **{"model.quantization": "compressed-tensors"})


def four_bit_groups(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in GPTQ's form, eight weights a number; and the weights that it stands for."""
    save("llama", folder)
    file = folder / "model.safetensors"
    stored, meant = {}, {}
    for name, tensor in load_file(file).items():
        if "_proj" not in name:
            stored[name] = meant[name] = tensor
            continue
        weights = tensor.T.contiguous()
        scales = (weights.unflatten(0, (-1, BLOCK)).abs().amax(1) / 7).half()
        spread = scales.float().repeat_interleave(BLOCK, 0)
        small = (weights / spread).round().clamp(-8, 7).int()
        meant[name], layer = (small.float() * spread).T.contiguous(), name.removesuffix("weight")
        packed = torch.zeros(len(weights) // 8, weights.shape[1], dtype=torch.int32)
        for place in range(8):
            packed |= (small[place::8] + 8) << (4 * place)
        stored[f"{layer}qweight"], stored[f"{layer}scales"] = packed, scales
        stored[f"{layer}qzeros"] = torch.full((len(scales), weights.shape[1] // 8), 0x77777777, dtype=torch.int32)
        stored[f"{layer}g_idx"] = (torch.arange(len(weights)) // BLOCK).int()
    save_file(stored, file, metadata={"format": "pt"})
    told(folder, quant_method="gptq", bits=4, group_size=BLOCK, desc_act=False, sym=True, checkpoint_format="gptq")
    return folder, meant


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_base_saved_in_gptq_is_adapted(tmp_path):
    """Where gptqmodel is; its first run compiles for minutes."""
    pytest.importorskip("gptqmodel")
    folder, meant = four_bit_groups(tmp_path / "gptq")
    config = read_config({"model.name": str(folder), "model.quantization": "gptq"})
    model = LoraModel(load(folder, **{"model.quantization": "gptq"}), config.lora)
    assert len(model.layers) == 14
    plain = load(save("llama", tmp_path / "plain"), **{"model.quantization": "none"})
    plain.load_state_dict(meant, strict=True)
    state = Recipe.build(config).start(model.spec, 0)
    model.install(state.adapter, state.scale, state.offset)
    tokens = torch.arange(5, 25)[None]
    logits = model.network(input_ids=tokens).logits
    torch.testing.assert_close(logits, plain(input_ids=tokens).logits, rtol=0, atol=2e-3)
    (b,) = model.train_only([Key(next(iter(model.layers)), "B")])
    model.network(input_ids=tokens, labels=tokens).loss.backward()
    assert b.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ("gptq", "--no-deps gptqmodel .* optimum"),
        ("awq", "--no-deps gptqmodel .* torchao"),
        ("compressed-tensors", "compressed-tensors"),
    ],
)
def test_a_package_that_is_not_there_is_named(method, packages, tmp_path, monkeypatch):
    monkeypatch.setattr("common.models.prequantised.find_spec", lambda name: None)
    folder = save("llama", tmp_path)
    told(folder, quant_method=method, bits=4)
    with pytest.raises(
        BouquetError, match=rf"the packages that read a base in {method} are not installed .*pip install {packages}, or"
    ):
        load(folder, **{"model.quantization": method})
    # A coordinator, which only asks for shapes, needs none of them.
    config = read_config({"model.name": str(folder), "model.quantization": method})
    assert base.skeleton(config.model, 0)
    with pytest.raises(
        BouquetError, match=rf"got weights in {method}. Set model.quantization = '{method}', or name the"
    ):
        load(folder)


def test_a_method_that_is_not_known_or_not_there_is_told(tmp_path):
    folder = save("llama", tmp_path)
    said = r"not quantised, and Bouquet does not .*, model.quantization\): expected 'nf4', 'int8' or 'none', got 'gptq'"
    with pytest.raises(BouquetError, match=said):
        load(folder, **{"model.quantization": "gptq"})
    told(folder, quant_method="hqq", bits=4)
    with pytest.raises(BouquetError, match=r"got weights in hqq. Name the unquantised base\."):
        load(folder)
