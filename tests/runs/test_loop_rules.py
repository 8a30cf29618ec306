"""What single rules, codecs and means do in a whole run."""

import json

import pytest
import torch

from common import wire
from common.adapter.structures import STRUCTURES
from common.adapter.values import Key
from common.error import BouquetError
from common.record import checkpoint
from tests.support.grid import run_in_process
from tests.support.outcome import events, failures, lines
from tests.support.replies import replace_tensors


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "nf4"])
def test_a_coarse_codec_sends_less_and_learns_about_as_much(codec, settings, tmp_path):
    for name, up in (("whole", "fp32"), ("coarse", codec)):
        longer = {"train.steps": 12, "train.learning-rate": 0.01, "run-name": name, "wire.up": up}
        run_in_process(settings(**longer), nodes=2)
    whole, coarse = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "coarse"))
    assert coarse["bytes_up"] < whole["bytes_up"] / (3.8 if codec == "int8" else 6.5)
    assert coarse["after"]["all"] == pytest.approx(whole["after"]["all"], rel=0.03)
    assert sorted(file.parent.name for file in (tmp_path / "state/runs/coarse").rglob("feedback-0002.safetensors")) == [
        "node-000",
        "node-001",
    ]
    assert not list((tmp_path / "state/runs/whole").rglob("*.safetensors"))


def test_fed_sb_starts_from_a_public_gradient_and_sends_its_frames_once(settings, tmp_path, capsys):
    public = tmp_path / "public.jsonl"
    public.write_text("\n".join(json.dumps({"text": f"def f{n}(self): return self.x + {n}"}) for n in range(8)))
    changes = {
        "rule.name": "fed-sb",
        "init.name": "lora-sb",
        "init.lora-sb.source": str(public),
        "init.lora-sb.step": 0.001,
        "lora.rank": 16,
    }
    grid = run_in_process(settings(**changes, **{"train.learning-rate": 0.02, "train.steps": 8}), nodes=2)
    assert f"the adapter is initialised from the base model and 50 examples of {public}" in capsys.readouterr().out
    train = [m for m in grid.sent if m.metadata.message_type == "train"]
    headers = [wire.unpack_state(m.content.array_records["state"], rule="fed-sb")[0] for m in train]
    assert [{part for _, part, _ in header.tensors} for header in headers] == [{"A", "B", "R"}] * 2 + [{"R"}] * 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] < summary["before"]["all"]
    state = checkpoint.load(tmp_path / "run/checkpoints/round-0002.safetensors", "fed-sb")
    a = state.adapter[Key("model.layers.0.mlp.up_proj", "A")]
    torch.testing.assert_close(a @ a.T, torch.eye(16), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_found_frames_are_sent_until_they_settle_and_once_more(settings, tmp_path):
    changes = {"rule.name": "fed-sb", "rule.fed-sb.start": "nodes", "num-server-rounds": 5, "lora.rank": 16}
    grid = run_in_process(settings(**{**changes, "train.learning-rate": 0.02, "train.steps": 6}), nodes=2)
    train = [m for m in grid.sent if m.metadata.message_type == "train"]
    headers = [wire.unpack_state(m.content.array_records["state"], rule="fed-sb")[0] for m in train]
    assert ["A" in {part for _, part, _ in header.tensors} for header in headers[::2]] == [True] * 3 + [False] * 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] < 0.95 * summary["before"]["all"]
    assert not failures(tmp_path / "run")


def test_one_round_of_flora_is_one_shot_and_loses_nothing(settings, tmp_path):
    own = {"rule.name": "flora", "num-server-rounds": 1, "train.steps": 8, "train.learning-rate": 0.02}
    grid = run_in_process(settings(**own), nodes=2)
    assert [message.metadata.message_type for message in grid.sent].count("train") == 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] < 0.9 * summary["before"]["all"]
    state = checkpoint.load(tmp_path / "run/checkpoints/round-0001.safetensors", "flora")
    assert state.offset[Key("model.layers.0.mlp.up_proj", "Q")].shape[1] == 2 * state.rank


def test_a_node_that_lost_its_frames_gets_them_again(settings, tmp_path):
    public = tmp_path / "public.jsonl"
    public.write_text("\n".join(json.dumps({"text": f"def f{n}(self): return {n}"}) for n in range(4)))
    changes = {
        "rule.name": "fed-sb",
        "init.name": "lora-sb",
        "init.lora-sb.source": str(public),
        "num-server-rounds": 3,
        "evaluation.every": 0,
    }
    lost = []

    def lose(content):
        if not lost:
            lost.append([file.unlink() for file in (tmp_path / "state").rglob("node-001/frames-*.safetensors")])
        return content

    run_in_process(settings(**changes), nodes=2, tamper={1: lose})
    assert ["frozen tensors differ" in reason for reason in failures(tmp_path / "run")] == [True]
    merges = [line for line in lines(tmp_path / "run") if line["phase"] == "merge"]
    assert [(line["nodes"], line["asked"]) for line in merges] == [(2, 2), (1, 2), (2, 2)]


def test_hetlora_gives_up_slots_and_the_messages_shrink(settings, tmp_path):
    changes = {"rule.name": "hetlora", "rule.hetlora.keep": 0.5, "rule.hetlora.decay": 100.0, "num-server-rounds": 3}
    grid = run_in_process(settings(**changes, **{"train.learning-rate": 0.01}), nodes=2)
    train = [m for m in grid.sent if m.metadata.message_type == "train"]
    ranks = [wire.unpack_state(m.content.array_records["state"], rule="hetlora")[0].rank for m in train]
    assert ranks[:2] == [8, 8]
    assert max(ranks[-2:]) < 8
    grid = run_in_process(settings(**{**changes, "resume": True, "num-server-rounds": 4}), nodes=2)
    train = [m for m in grid.sent if m.metadata.message_type == "train"]
    resumed = [wire.unpack_state(m.content.array_records["state"], rule="hetlora")[0].rank for m in train]
    assert all(now <= before for now, before in zip(resumed, ranks[-2:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"server-optimizer.name": "adam"}, {"server-optimizer.name": "momentum"}, {"wire.up": "nf4"}]
)
def test_what_the_server_remembers_survives_a_resume(changes, settings, tmp_path):
    whole = settings(**{"run-name": "whole", "num-server-rounds": 3, **changes})
    run_in_process(whole, nodes=2)
    part = {**whole, "run-name": "broken"}
    run_in_process({**part, "num-server-rounds": 2, "train.schedule": "constant"}, nodes=2)
    whole = {**whole, "run-name": "constant", "train.schedule": "constant"}
    run_in_process(whole, nodes=2)
    run_in_process({**part, "train.schedule": "constant", "resume": True}, nodes=2)
    constant, broken = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("constant", "broken"))
    assert broken["adapter_digest"] == constant["adapter_digest"]


@pytest.mark.slow
@pytest.mark.parametrize("mean", ["median", "trimmed", "krum", "rank-vote"])
def test_a_robust_mean_keeps_a_hostile_node_from_ruining_the_run(mean, settings, tmp_path):
    ruin = replace_tensors(lambda tensors: {key: 1e4 * tensor for key, tensor in tensors.items()})
    changes = {"mean.name": mean, "mean.trimmed.share": 0.3, "num-server-rounds": 1}
    run_in_process(settings(**changes), nodes=4, tamper={3: ruin})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] < summary["before"]["all"]


def test_fedspeed_goes_on_from_what_a_node_remembers(settings, tmp_path):
    """Nodes that have lost their corrections end elsewhere."""
    lost, digests = [], set()

    def lose(content):
        for file in (tmp_path / "state/runs/forgetful").rglob("objective-0001.safetensors"):
            lost.append(file.parent.name)
            file.unlink()
        return content

    for name, tamper in (("whole", {}), ("forgetful", {0: lose, 1: lose})):
        changes = {"objective.name": "fedspeed", "run-name": name, "evaluation.every": 0}
        run_in_process(settings(**changes), nodes=2, tamper=tamper)
        digests.add(json.loads((tmp_path / name / "summary.json").read_text())["adapter_digest"])
    assert sorted(lost) == ["node-000", "node-001"]
    assert len(digests) == 2


def test_a_robust_mean_or_an_optimizer_for_a_rule_that_stacks_is_refused(settings):
    with pytest.raises(BouquetError, match=r"'flora' needs more than a mean .*Rules that support these are fedit"):
        run_in_process(settings(**{"rule.name": "flora", "mean.name": "median"}), nodes=2)


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "lora"])
def test_a_run_of_every_structure_ends_with_nobody_left_out(structure, settings, tmp_path):
    """Frames that are computed, and travel once, are the same on both sides to the bit."""
    run_in_process(settings(**{"adapter.name": structure, "train.steps": 1, "min-nodes": 1}), nodes=1)
    assert failures(tmp_path / "run") == []
    before, *_, after = events(tmp_path, "heldout")
    assert after["loss"] != before["loss"]


def test_a_start_that_the_offset_takes_off_is_written_down_while_one_factor_rests(settings, tmp_path):
    """What the offset takes off is a factor, which must not be the very tensor: a checkpoint has each by itself."""
    own = {"rule.name": "rolora", "init.name": "pissa", "num-server-rounds": 1, "train.steps": 1, "min-nodes": 1}
    run_in_process(settings(**own), nodes=1)
    assert failures(tmp_path / "run") == []
    assert (tmp_path / "run/checkpoints/round-0001.safetensors").exists()


def test_flasc_goes_on_from_an_adapter_as_it_is(settings, tmp_path):
    """Of which it would send some values, were it the factors."""
    once = {"num-server-rounds": 1, "min-nodes": 1, "evaluation.export": "last"}
    run_in_process(settings(**once | {"run-name": "before", "train.learning-rate": 0.02}), nodes=1)
    again = {"run-name": "after", "rule.name": "flasc", "model.adapter": str(tmp_path / "before/adapter")}
    run_in_process(settings(**once | again), nodes=1)
    *_, left = events(tmp_path, "heldout", "before")
    start, *_ = events(tmp_path, "heldout", "after")
    assert start["loss"] == pytest.approx(left["loss"], rel=1e-5)
