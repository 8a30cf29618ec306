"""What a run leaves that is no LoRA: an adapter of another form of PEFT's, or a merged model, and nothing else."""

import pytest
import torch

from common.adapter.values import Key
from common.error import BouquetError
from common.record.export import export, read
from deploy import adapters
from deploy.command import main
from strategies import read_config
from tests.support.adapters import run_directory, trained

TEXT = ["--prompt", "def get(self", "--prompt", "import os"]


def make(tmp_path, *arguments, source="run", to="out"):
    return main(["export", str(tmp_path / source), "--to", str(tmp_path / to), *arguments])


def test_a_folder_is_read_as_it_was_written(tmp_path):
    config, state = run_directory(tmp_path / "run", **{"adapter.name": "ia3"})
    export(state, config, tmp_path / "adapter", with_head=True)
    restored = read(tmp_path / "adapter").state
    assert restored.round == state.round
    assert {key.part for key in restored.adapter} == {"g"}
    for key, tensor in restored.adapter.items():
        torch.testing.assert_close(restored.scale * tensor, state.scale * state.adapter[key])
    state = trained(config := read_config({"adapter.name": "dora"}))
    export(state, config, tmp_path / "other", with_head=True)
    restored = read(tmp_path / "other").state
    for layer in state.layers():
        magnitude = state.adapter[Key(layer, "n")] * (1 + state.scale * state.adapter[Key(layer, "g")])
        torch.testing.assert_close(restored.adapter[Key(layer, "n")], magnitude)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(file.read_text().replace('"IA3"', '"OFT"'))
    with pytest.raises(BouquetError, match=r"an adapter folder cannot be read .*got KeyError: 'OFT'"):
        read(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["ia3", "dora"])
def test_what_is_no_lora_is_merged_and_has_no_other_form(name, tmp_path, capsys):
    """Merged, it is held to the run's own model before it is left."""
    run_directory(tmp_path / "run", **{"adapter.name": name})
    assert make(tmp_path, *TEXT) == 2
    assert f"no LoRA computes what the structure '{name}' does" in capsys.readouterr().err
    assert make(tmp_path, *TEXT, source="run/adapter") == 2
    assert "the adapter is no LoRA" in capsys.readouterr().err
    assert make(tmp_path, *TEXT, "--form", "merged") == 0
    assert "that of the weights, merged into bf16 weights" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_scales_a_quantised_layer_answers_in_its_type(quantization, tmp_path):
    settings = {"adapter.name": "ia3", "model.quantization": quantization, "model.dtype": "bfloat16"}
    config, _ = run_directory(tmp_path / "run", **settings)
    network = adapters.load(tmp_path / "run/adapter", config, "cpu")
    with torch.no_grad():
        answered = network(input_ids=torch.arange(5, 40)[None]).logits
        with network.disable_adapter():
            bare = network(input_ids=torch.arange(5, 40)[None]).logits
    assert answered.dtype == bare.dtype == torch.bfloat16
    assert (answered - bare).abs().max() > 0.5
