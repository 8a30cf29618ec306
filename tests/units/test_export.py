"""`bouquet export`: what is written computes what the run's model computed, and what does not is not left behind."""

import json
import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.adapter.values import Key, State
from common.error import BouquetError
from common.models import base, embedded
from common.models.adapted import LoraModel
from common.record.export import export, read
from common.record.form import one_lora
from deploy.command import main
from deploy.export import comparison, forms
from strategies import read_config
from tests.support.adapters import dense, run_directory, trained
from tests.support.architectures import tiny_bert
from tests.support.grid import run_in_process

TEXT = ["--prompt", "def get(self", "--prompt", "import os"]
PAIRS = {"task.name": "classify", "task.labels": 3, "lora.targets": "query,value", "model.quantization": "none"}


def make(tmp_path, *arguments, source="run", to="out"):
    return main(["export", str(tmp_path / source), "--to", str(tmp_path / to), *arguments])


@pytest.mark.parametrize("rule", ["fedit", "fedex-lora", "florist", "ravan", "fed-sb", "fed-plora"])
def test_one_lora_is_the_whole_update_and_every_layer_has_one_rank(rule, tmp_path):
    config = read_config({"rule.name": rule})
    state = trained(config)
    export(state, config, tmp_path, with_head=True)
    (restored, settings) = read(tmp_path)
    assert settings["rule.name"] == rule
    assert not {key for key in settings if key.startswith(("data.", "evaluation.", "run-directory"))}
    assert restored.round == state.round
    assert "rank_pattern" not in {key for key, value in _peft(tmp_path).items() if value}
    for layer in state.layers():
        assert len(restored.adapter[Key(layer, "A")]) == restored.rank
        torch.testing.assert_close(dense(restored, layer), dense(state, layer), rtol=1e-4, atol=1e-5)


def _peft(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_cut_is_the_nearest_of_its_rank_and_its_energy_is_true():
    state = trained(read_config({"rule.name": "fedex-lora"}))
    small, energy = forms.cut(state, 5)
    kept = total = 0.0
    for layer in state.layers():
        singular = torch.linalg.svdvals(dense(state, layer).double())
        error = (dense(state, layer) - dense(small, layer)).double().norm()
        torch.testing.assert_close(error, singular[5:].norm(), rtol=1e-4, atol=1e-4)
        kept, total = kept + float(singular[:5].square().sum()), total + float(singular.square().sum())
    assert energy == pytest.approx(kept / total, rel=1e-5)
    assert small.rank == 5
    with pytest.raises(
        BouquetError, match=r"cannot be truncated to \(--rank\): expected 1 to 40, its full rank, got 41"
    ):
        forms.cut(state, 41)


def test_a_peft_folder_computes_what_the_nodes_would(tmp_path, capsys):
    config, state = run_directory(tmp_path / "run", **{"rule.name": "fedex-lora", "data.source": "/data/ward.jsonl"})
    assert make(tmp_path, *TEXT) == 0
    said = capsys.readouterr().out
    assert "rank 40 in every layer" in said
    assert f"--enable-lora --max-lora-rank 64 --lora-modules out={tmp_path / 'out'}" in said
    assert f"convert_lora_to_gguf.py --base {embedded.unpack()}" in said

    model = LoraModel(base.load(config.model, 0, torch.device("cpu")), config.lora)
    model.install(state.adapter, state.scale, state.offset)
    loaded = PeftModel.from_pretrained(base.load(config.model, 0, torch.device("cpu")), str(tmp_path / "out"))
    tokens = torch.arange(5, 40)[None]
    with torch.no_grad():
        ours = model.network.eval()(input_ids=tokens).logits
        torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, ours, rtol=1e-4, atol=1e-4)
    assert "/data/ward.jsonl" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.[jm][sd]*"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_merged_model_is_the_base_and_the_update_in_its_type(name, dtype, tmp_path, capsys):
    _, state = run_directory(tmp_path / "run", **{"rule.name": "fedex-lora"})
    assert make(tmp_path, *TEXT, "--form", "merged", "--dtype", name) == 0
    said = capsys.readouterr().out
    assert "over the nf4 base that it was trained on, its logits differ by up to" in said
    assert f"convert_hf_to_gguf.py {tmp_path / 'out'}" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(embedded.unpack(), dtype=torch.float32)
    layer = state.layers()[3]
    weight = merged.get_submodule(layer).weight
    assert weight.dtype == dtype
    exact = original.get_submodule(layer).weight + dense(state, layer)
    torch.testing.assert_close(weight.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("def")["input_ids"]


@pytest.mark.parametrize(
    "arguments", [["--rank", "1", "--tolerance", "0.01"], ["--form", "merged", "--tolerance", "1e-6"]]
)
def test_what_is_not_the_runs_model_is_not_left_behind(arguments, tmp_path, capsys):
    run_directory(tmp_path / "run")
    assert make(tmp_path, *TEXT, *arguments) == 2
    assert (
        "bouquet: the export differs from the run's model, and was not kept: expected at most"
        in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_adapter_that_changes_nothing_is_told(tmp_path):
    config = read_config({})
    export(trained(config, rounds=0), config, tmp_path / "run", with_head=True)
    logits = comparison.own(read(tmp_path / "run").state, config, [{"input_ids": torch.tensor([[1, 2, 3]])}], "cpu")
    with pytest.raises(BouquetError, match="the adapter changes nothing"):
        logits.compare(logits.own)


def test_the_card_says_what_is_known_and_no_more(tmp_path):
    run_directory(tmp_path / "run", **{"rule.name": "fedex-lora", "data.source": "/data/ward.jsonl"})
    events = [{"phase": "train", "round": 1, "node": f"ward-{n}", "examples": 100 + n} for n in (1, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"torn')
    assert make(tmp_path, *TEXT, "--licence", "apache-2.0") == 0
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        "license: apache-2.0",
        "library_name: peft",
        "| aggregation rule | `fedex-lora` (arXiv:2410.09432) |",
        "| rounds | 2 |",
        "| nodes | 2 |",
        "| training examples | 203, from 101 to 102 per node |",
        "| privacy | none: updates left the nodes in the clear |",
        "| held-out perplexity | 30.5 on all nodes' held-out examples, 90.25 before training |",
        'AutoPeftModelForCausalLM.from_pretrained("out")',
        "largest logit difference",
    ):
        assert line in card
    assert "ward-1" not in card


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """The embedded model as one that has come from the hub: its id."""
    folder = tmp_path / "cache" / "models--some--base"
    shutil.copytree(embedded.unpack(), folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base.commit.cache_clear()
    return "some/base"


def test_the_commit_of_the_base_is_exported_whatever_moves_its_branch_later(on_hub, tmp_path):
    run_directory(tmp_path / "run", **{"model.name": on_hub})
    assert make(tmp_path, *TEXT) == 0
    for folder in (tmp_path / "run" / "adapter", tmp_path / "out"):
        assert _peft(folder)["base_model_name_or_path"] == on_hub
        assert _peft(folder)["revision"] == COMMIT
        assert read(folder).settings["model.revision"] == COMMIT
    card = (tmp_path / "out/README.md").read_text()
    assert f"| base model | `some/base`, revision {COMMIT} |" in card
    assert "base_model: some/base" in card
    assert base.commit(read_config({}).model) is None


PRIVATE = {"privacy.mode": "example", "train.weighting": "uniform", "privacy.epsilon": 3.0}


def test_the_card_of_a_private_run_tells_epsilon_and_no_size(tmp_path):
    run_directory(tmp_path / "run", **PRIVATE)
    (tmp_path / "run/metrics.jsonl").write_text('{"phase": "train", "round": 1, "node": "a", "norm": 1.5}\n')
    assert make(tmp_path, *TEXT) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "(example) differential privacy of one example: epsilon at most 3 at delta 1e-05 for the whole run" in card
    assert "| training examples | not disclosed: the run was private |" in card
    assert "| licence | as the base model's |" in card


def test_wrong_sources_are_told_apart(tmp_path, capsys):
    run_directory(tmp_path / "run", finished=False)

    def refused(*arguments, source="run"):
        assert make(tmp_path, *arguments, source=source) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "there is no run or adapter here" in refused(source="nothing")
    assert "expected 1 to 8, its full rank, got 9" in refused(*TEXT, "--rank", "9")
    assert "a merged model has no rank" in refused("--form", "merged", "--rank", "4")
    assert "a PEFT folder keeps the adapter's own values" in refused("--dtype", "bf16")
    assert "the base model is missing (model.name): got /no/model. Say where it is: --model" in refused(
        "--model", "/no/model"
    )
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert "the run has no checkpoint" in refused()


def test_a_run_that_is_not_finished_gives_its_newest_state(tmp_path, capsys):
    run_directory(tmp_path / "run", finished=False)
    assert make(tmp_path, *TEXT) == 0
    assert "the run is not finished: its state after round 2 is exported" in capsys.readouterr().out


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    run_directory(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    assert make(tmp_path, *TEXT) == 2
    assert f"the target already exists ({tmp_path / 'out'})" in capsys.readouterr().err
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_shared_head_comes_along(form, tmp_path, capsys):
    name = tiny_bert(tmp_path)
    _, state = run_directory(tmp_path / "run", **PAIRS, **{"model.name": name})
    assert make(tmp_path, *TEXT, "--form", form) == 0
    assert "vLLM and llama.cpp serve language models" in capsys.readouterr().out
    if form == "merged":
        head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto").classifier.weight
        torch.testing.assert_close(head.float(), state.adapter[Key("classifier", "W")], rtol=0.01, atol=0.01)
    else:
        saved = load_file(tmp_path / "out/adapter_model.safetensors")["base_model.model.classifier.weight"]
        assert torch.equal(saved, state.adapter[Key("classifier", "W")])
        assert "num_labels=3" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_the_classes_keep_their_names(form, tmp_path):
    """The card's own lines, run as they stand, give a model that says its classes' names."""
    named = {"model.name": tiny_bert(tmp_path), "task.classes": "late, early, on time"}
    run_directory(tmp_path / "run", **PAIRS, **named)
    assert make(tmp_path, *TEXT, "--form", form) == 0
    scope: dict[str, Any] = {}
    card = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(card.replace('"out', f'"{tmp_path}/out'), scope)
    assert scope["model"].config.id2label == {0: "late", 1: "early", 2: "on time"}


def test_a_head_over_mean_pooling_is_an_adapter_and_a_file_and_no_model(tmp_path, capsys):
    run_directory(tmp_path / "run", **PAIRS, **{"model.name": tiny_bert(tmp_path), "model.pooling": "mean"})
    assert make(tmp_path, *TEXT, "--form", "merged") == 2
    assert "Transformers has no model with this head (model.pooling = 'mean')" in capsys.readouterr().err
    assert make(tmp_path, *TEXT) == 0
    scope: dict[str, object] = {}
    card = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(card.replace('"out', f'"{tmp_path}/out'), scope)  # the lines of the card are run as they stand
    with torch.no_grad():
        assert scope["classify"](["one text", "another, longer text"]).shape == (2, 3)


@pytest.mark.slow
def test_personal_adapters_are_found_with_their_node_and_by_their_folder(settings, tmp_path, capsys):
    run_in_process(settings(**{"rule.name": "fedsa-lora", "train.steps": 2, "evaluation.limit": 2}), nodes=2)
    assert make(tmp_path, *TEXT) == 2
    assert "every node has its own" in capsys.readouterr().err
    assert make(tmp_path, "--node", "node-7") == 2
    assert "expected one of node-000, node-001" in capsys.readouterr().err
    assert make(tmp_path, *TEXT, "--node", "node-001") == 0
    own = tmp_path / "state/runs/run/node-001/adapter"
    assert _weights(tmp_path / "out").keys() == _weights(own).keys()
    assert all(torch.equal(tensor, _weights(own)[name]) for name, tensor in _weights(tmp_path / "out").items())
    assert "It is one node's own model" in (tmp_path / "out/README.md").read_text()
    assert make(tmp_path, source=own.relative_to(tmp_path)) == 2
    assert make(tmp_path, *TEXT, source=own.relative_to(tmp_path), to="again") == 0
    assert "It is one node's own model" in (tmp_path / "again/README.md").read_text()
    assert make(tmp_path, *TEXT, "--node", "node-001", source=own.relative_to(tmp_path), to="third") == 2
    assert "this is an adapter already (--node node-001): expected a run directory" in capsys.readouterr().err


def _weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_padding_a_rank_changes_no_product():
    state = State(
        {Key("l", "A"): torch.randn(2, 5), Key("l", "B"): torch.randn(4, 2), Key("m", "A"): torch.randn(2, 3)}
        | {Key("m", "B"): torch.randn(6, 2)},
        0.5,
        offset={Key("m", "Q"): torch.randn(6, 1), Key("m", "P"): torch.randn(1, 3)},
    )
    padded = one_lora(state)
    assert padded.rank == 3
    for layer in ("l", "m"):
        torch.testing.assert_close(dense(padded, layer), dense(state, layer))
