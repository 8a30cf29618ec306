"""The whole ServerApp and ClientApp in one process: results, repeatability, resume, scores, heads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common import wire
from common.adapter.algebra import digest
from common.adapter.values import Key
from common.config.run import RunConfig
from common.error import BouquetError
from common.record import checkpoint
from strategies import RULES, Recipe
from tests.support.architectures import tiny_bert
from tests.support.cells import each_rule
from tests.support.grid import run_in_process
from tests.support.outcome import lines


# One direction a step takes hundreds of steps: tests/runs/test_methods.py has them.
@pytest.mark.parametrize("rule", each_rule(lambda rule: rule().structure.gradient == "backward"))
def test_a_run_at_its_rules_defaults_learns_and_leaves_its_record(rule, settings, tmp_path, capsys):
    """The default rounds at the rule's own learning rate, in steps as few as a test can have."""
    whole = RunConfig()
    few = {"num-server-rounds": whole.num_server_rounds, "train.steps": 6, "evaluation.every": 0}
    # NF4 takes a CPU twice the time; one rule has it, as by default.
    base = whole.model.quantization if rule == "fedit" else "none"
    run_in_process(settings(**{"rule.name": rule, "model.quantization": base, **few}), nodes=2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    # Of all nodes together: what one of them has, and learns, depends on the Python that runs this.
    assert summary["after"]["all"] < 0.95 * summary["before"]["all"]
    assert "ended where it began" not in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "run").iterdir()} | (
        {"adapter"} if Recipe.around(RULES[rule]()).personal else set()
    )
    assert left == {"adapter", "checkpoints", "config.json", "metrics.jsonl", "report.html", "run.log", "summary.json"}
    train = [line for line in lines(tmp_path / "run") if line["phase"] == "train"]
    rounds = range(1, whole.num_server_rounds + 1)
    assert [(line["round"], line["node"]) for line in train] == [
        (number, node) for number in rounds for node in ("node-000", "node-001")
    ]
    assert len(list((tmp_path / "run/checkpoints").glob("round-*.safetensors"))) == whole.checkpoint.newest


def test_what_a_rule_loses_is_recorded_and_an_exact_rule_is_named(settings, tmp_path, capsys):
    for name, learning_rate in (("fedit", 0.05), ("fedex-lora", 0.05)):
        run_in_process(settings(**{"rule.name": name, "run-name": name, "train.learning-rate": learning_rate}), nodes=3)
    errors = [line["overall"] for line in lines(tmp_path / "fedit") if line["phase"] == "aggregation-error"]
    assert len(errors) == 2
    assert all(0 < error < 1 for error in errors)
    assert not [line for line in lines(tmp_path / "fedex-lora") if line["phase"] == "aggregation-error"]
    shown = capsys.readouterr().out
    assert shown.count("of the nodes' mean update; exact rules are ffa-lora, rolora") == (max(errors) > 0.1)


def test_a_prompt_is_continued_before_and_after(settings, capsys):
    run_in_process(settings(**{"evaluation.prompt": "class ", "num-server-rounds": 1}), nodes=2)
    shown = capsys.readouterr().out
    assert "before:\n    class " in shown
    assert "after:\n    class " in shown


def test_two_runs_with_one_seed_are_equal_to_the_bit(settings, tmp_path):
    for name, first_id in (("one", 1000), ("two", 77)):
        run_in_process(settings(**{"run-name": name, "fraction-train": 0.5}), nodes=4, first_id=first_id)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert one["adapter_digest"] == two["adapter_digest"]
    run_in_process(settings(**{"run-name": "three", "seed": 1}), nodes=4)
    three = json.loads((tmp_path / "three/summary.json").read_text())
    assert three["adapter_digest"] != one["adapter_digest"]


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(settings, tmp_path):
    whole = settings(**{"run-name": "whole", "num-server-rounds": 3, "rule.name": "fedex-lora"})
    run_in_process(whole, nodes=2)
    shutil.copytree(tmp_path / "whole/checkpoints", tmp_path / "broken/checkpoints")
    torn = tmp_path / "broken/checkpoints/round-0003.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    (tmp_path / "broken/checkpoints/round-0002.safetensors").unlink()
    run_in_process({**whole, "run-name": "broken", "resume": True}, nodes=2)
    whole_run, broken = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    assert broken["adapter_digest"] == whole_run["adapter_digest"]


def test_personal_factors_survive_a_resume(settings, tmp_path):
    config = settings(**{"rule.name": "fedsa-lora", "num-server-rounds": 1})
    run_in_process(config, nodes=2)
    (first, _) = [load_file(file) for file in sorted((tmp_path / "state").rglob("personal-*.safetensors"))]
    grid = run_in_process({**config, "resume": True}, nodes=2)
    assert [message.metadata.message_type for message in grid.sent] == ["query"] * 2 + ["evaluate"] * 2
    (file, _) = sorted((tmp_path / "state").rglob("adapter_model.safetensors"))
    layer = "model.layers.0.mlp.up_proj"
    assert torch.equal(load_file(file)[f"base_model.model.{layer}.lora_B.weight"], first[f"{layer}:B"])
    assert [entry.name for entry in (tmp_path / "state/runs").iterdir() if entry.is_dir()] == ["run"]


def test_a_name_that_is_taken_is_refused(settings):
    run_in_process(settings(**{"num-server-rounds": 1}), nodes=2)
    with pytest.raises(BouquetError, match=r"a run with this name already exists .*Choose another run-name"):
        run_in_process(settings(), nodes=2)


@pytest.mark.parametrize("rule", each_rule())
def test_the_wire_carries_only_what_the_rule_names(rule, settings, tmp_path):
    grid = run_in_process(settings(**{"rule.name": rule, "num-server-rounds": 1}), nodes=2)
    state = checkpoint.load(tmp_path / "run/checkpoints/round-0001.safetensors", rule)
    down, _ = wire.unpack_state(grid.sent[2].content.array_records["state"], rule=rule)
    recipe = Recipe.around(RULES[rule]())
    parts = recipe.rule.plan(0).sent
    assert {part for _, part, _ in down.tensors} == recipe.structure.parts - {"s"} - recipe.drawn
    sent = sum(tensor.numel() for key, tensor in state.adapter.items() if key.part in parts)
    train = next(line for line in lines(tmp_path / "run") if line["phase"] == "train")
    least = sent = int(sent * {"flasc": 0.25 + 1 / 32, "fedsrd": 0.15 + 1 / 32}.get(rule, 1))
    if rule == "fedsrd":  # fewer, the more unevenly they matter
        least = int(sent * (0.04 + 1 / 32) / (0.15 + 1 / 32))
    if rule == "fedkseed":
        least = sent = 1  # what has not moved is zero, and does not travel
    assert 4 * least <= train["bytes_up"] <= 4 * sent * 1.02 + 2000


@pytest.mark.parametrize("rule", each_rule(lambda rule: rule.mixed_ranks and rule.name != "ravan"))
def test_nodes_of_several_ranks_train_together(rule, settings, tmp_path):
    changes = {"rule.name": rule, "train.steps": 12, "train.learning-rate": 0.01}
    grid = run_in_process(settings(**changes), nodes=2, node_config={1: {"lora-rank": 2}})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] < summary["before"]["all"]
    headers = [wire.unpack_state(message.content.array_records["state"], rule=rule)[0] for message in grid.sent[2:4]]
    assert [header.rank for header in headers] == [8, 2]
    up = [line["bytes_up"] for line in lines(tmp_path / "run") if line["phase"] == "train" and line["round"] == 1]
    assert up[1] == pytest.approx(up[0] / 4, rel=0.05)


def test_a_node_of_a_smaller_rank_trains_some_of_ravans_heads(settings, tmp_path):
    changes = {"rule.name": "ravan", "lora.rank": 64, "train.learning-rate": 0.05}
    grid = run_in_process(settings(**changes), nodes=2, node_config={1: {"lora-rank": 32}})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] < summary["before"]["all"]
    headers = [wire.unpack_state(message.content.array_records["state"], rule="ravan")[0] for message in grid.sent[2:4]]
    assert [len(header.slots) for header in headers] == [0, 2]
    up = [line["bytes_up"] for line in lines(tmp_path / "run") if line["phase"] == "train" and line["round"] == 1]
    assert up[1] == pytest.approx(up[0] / 2, rel=0.05)
    # What not all nodes have trained is not the mean of their models, and is measured.
    assert any(line["phase"] == "aggregation-error" for line in lines(tmp_path / "run"))


def test_a_personal_b_stays_on_its_node_and_is_exported_there(settings, tmp_path):
    grid = run_in_process(settings(**{"rule.name": "fedsa-lora"}), nodes=3)
    for message in grid.sent:
        for record in message.content.array_records.values():
            assert {part for _, part, _ in wire.unpack_state(record, rule="fedsa-lora")[0].tensors} == {"A"}
    personal = [load_file(file) for file in sorted((tmp_path / "state").rglob("personal-0002.safetensors"))]
    exported = [load_file(file) for file in sorted((tmp_path / "state").rglob("adapter_model.safetensors"))]
    layer = "model.layers.0.mlp.up_proj"
    name = f"base_model.model.{layer}"
    for own, adapter in zip(personal, exported, strict=True):
        assert torch.equal(own[f"{layer}:B"], adapter[f"{name}.lora_B.weight"])
        assert torch.equal(adapter[f"{name}.lora_A.weight"], exported[0][f"{name}.lora_A.weight"])
    assert not torch.equal(personal[0][f"{layer}:B"], personal[1][f"{layer}:B"])


@pytest.mark.parametrize("export", ["best", "last"])
def test_the_best_round_is_exported_or_the_last(export, settings, tmp_path):
    """Two rounds that learn, and after them, in another session, two that unlearn all of it."""
    run = settings(**{"train.clip-norm": 0.0, "evaluation.export": export, "checkpoint.newest": 1})
    run_in_process(run, nodes=2)
    run_in_process(run | {"num-server-rounds": 4, "resume": True, "train.learning-rate": 0.5}, nodes=2)
    heldout = {line["round"]: line for line in lines(tmp_path / "run") if line["phase"] == "heldout"}
    best = min((number for number in heldout if number), key=lambda number: heldout[number]["loss"])
    assert best < 3
    exported = best if export == "best" else 4
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["rounds"], summary["after"]["all"]) == (exported, heldout[exported]["score"])
    assert set(summary["after"]) == {"node-000", "node-001", "all"}
    state = checkpoint.load(tmp_path / f"run/checkpoints/round-{exported:04d}.safetensors", "fedit")
    assert summary["adapter_digest"] == digest(state.adapter | state.offset)
    assert json.loads((tmp_path / "run/adapter/bouquet.json").read_text())["round"] == exported
    said = f"round {best} of 4 is exported: the lowest held-out loss (evaluation.export=last exports the last)"
    assert (said in (tmp_path / "run/run.log").read_text()) == (export == "best")


def test_early_stop_keeps_the_best_round(settings, tmp_path):
    diverging = {"num-server-rounds": 6, "round.patience": 1, "train.learning-rate": 0.5, "train.schedule": "constant"}
    run_in_process(settings(**diverging, **{"train.clip-norm": 0.0}), nodes=2)
    heldout = {line["round"]: line["loss"] for line in lines(tmp_path / "run") if line["phase"] == "heldout"}
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["rounds"] == min(heldout, key=heldout.get) < max(heldout) < 6


def test_central_evaluation_scores_the_coordinators_own_data(settings, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"def f{i}(self):\n    return self.x\n"}) + "\n" for i in range(4)))
    run_in_process(settings(**{"evaluation.source": str(own), "num-server-rounds": 1}), nodes=2)
    central = [line["score"] for line in lines(tmp_path / "run") if line["phase"] == "central"]
    assert len(central) == 2
    assert central[1] < central[0]


def labelled(source):
    records = [{"text": f"{'good' if i % 2 else 'bad'} thing number {i}", "label": i % 2} for i in range(60)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(source)


@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_a_head_is_shared_local_or_frozen(head, settings, tmp_path):
    source = labelled(tmp_path / "labels.jsonl")
    grid = run_in_process(
        settings(
            **{
                "model.name": tiny_bert(tmp_path),
                "lora.targets": "query,value",
                "task.name": "classify",
                "task.head": head,
                "data.source": source,
                "data.partition": "iid",
            }
        ),
        nodes=2,
    )
    down, _ = wire.unpack_state(grid.sent[2].content.array_records["state"], rule="fedit")
    assert ("W" in {part for _, part, _ in down.tensors}) == (head == "shared")
    kept = sorted((tmp_path / "state").rglob("personal-0002.safetensors"))
    assert len(kept) == (2 if head == "local" else 0)
    if head == "local":
        one, two = map(load_file, kept)
        assert not torch.equal(one["classifier:W"], two["classifier:W"])
        assert {file.stat().st_mode & 0o777 for file in kept} == {0o600}
    for phase in ("evaluate", "heldout"):
        assert all(0 <= line["further"]["macro-f1"] <= 1 for line in lines(tmp_path / "run") if line["phase"] == phase)
    exported = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert ("base_model.model.classifier.weight" in exported) == (head != "local")


def test_where_every_node_has_its_own_model_there_is_no_central_score(settings, tmp_path):
    data = {"data.source": labelled(tmp_path / "labels.jsonl"), "data.partition": "iid"}
    heads = {"task.name": "classify", "task.labels": 2, "task.head": "local", **data}
    for number, personal in enumerate((heads, {"rule.name": "fedsa-lora"})):
        changes = {"evaluation.source": "x.jsonl", "run-name": f"run-{number}"}
        with pytest.raises(BouquetError, match=r"no global model to score centrally .*Leave evaluation.source empty"):
            run_in_process(settings(**personal, **changes), nodes=2)


def test_bf16_on_the_wire_halves_the_bytes_and_the_nodes_agree(settings, tmp_path):
    for codec in ("fp32", "bf16", "fp16"):
        run_in_process(
            settings(**{"wire.up": codec, "wire.down": codec, "run-name": codec, "num-server-rounds": 1}), nodes=2
        )
    up = {
        codec: json.loads((tmp_path / codec / "summary.json").read_text())["bytes_up"]
        for codec in ("fp32", "bf16", "fp16")
    }
    assert up["bf16"] == pytest.approx(up["fp32"] / 2, rel=0.02)
    assert up["fp16"] == pytest.approx(up["fp32"] / 2, rel=0.02)
    adapters = [load_file(tmp_path / codec / "adapter/adapter_model.safetensors") for codec in ("fp32", "bf16")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=0, atol=2e-2)


def test_the_digest_tells_tensors_apart():
    assert digest({Key("a", "A"): torch.ones(2)}) != digest({Key("a", "B"): torch.ones(2)})
