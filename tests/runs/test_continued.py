"""A whole run that starts from what an earlier one has left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common import wire
from common.adapter.algebra import digest
from common.adapter.values import Key, State
from common.record import checkpoint
from common.record.export import read
from tests.support.adapters import dense, made
from tests.support.grid import InProcessGrid, run_in_process
from tests.support.outcome import failures


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def headers(grid: InProcessGrid, rule: str) -> list[set[str]]:
    """The parts in each message to train."""
    sent = [message for message in grid.sent if message.metadata.message_type == "train"]
    read = [wire.unpack_state(message.content.array_records["state"], rule=rule)[0] for message in sent]
    return [{part for _, part, _ in header.tensors} for header in read]


def newest(folder: Path, rule: str) -> State:
    state = checkpoint.latest(folder / "checkpoints", rule)
    assert state is not None
    return state


SHORT = {
    "train.steps": 1,
    "train.batch-size": 2,
    "train.schedule": "constant",
    "train.warmup": 0.0,
    "task.max-length": 16,
    "evaluation.every": 0,
    "evaluation.limit": 2,
    "model.quantization": "none",
    "lora.targets": "q_proj,v_proj",
}


@pytest.mark.slow
def test_a_run_goes_on_from_the_adapter_of_another(settings, tmp_path, capsys):
    whole = {"train.learning-rate": 0.01, "train.steps": 6, "evaluation.every": 0, "model.quantization": "none"}
    run_in_process(settings(**whole, **{"run-name": "first"}), nodes=2)
    adapter = tmp_path / "first" / "adapter"
    base, ended = (summary(tmp_path / "first")[when]["all"] for when in ("before", "after"))
    assert ended < 0.95 * base
    slower = {**whole, "train.learning-rate": 0.002, "model.adapter": str(adapter), "run-name": "second"}
    run_in_process(settings(**slower), nodes=2)
    assert f"starts from the adapter {adapter}: rank 8 in 42 layers; it becomes the factors" in capsys.readouterr().out
    assert summary(tmp_path / "second")["before"]["all"] == pytest.approx(ended, rel=1e-6)
    assert summary(tmp_path / "second")["after"]["all"] < ended
    # The export stands by itself: it tells neither where the adapter was nor needs it.
    exported = read(tmp_path / "second" / "adapter")
    assert exported.state.rank == 8
    assert not [key for key in exported.settings if key.startswith("model.adapter")]


@pytest.mark.slow
def test_a_start_of_its_own_or_a_smaller_rank_keeps_the_whole_adapter(settings, tmp_path, capsys):
    flat, before = {**SHORT, "model.adapter": made(tmp_path)}, []
    under = "it becomes the offset beneath the run's own start"
    cut = "% of its energy goes into the factors, the rest into the offset"
    for rule, rank, said, parts, own in (
        ("fedit", 8, "it becomes the factors", [{"A", "B"}] * 4, {}),
        ("ffa-lora", 4, cut, [{*"ABQP"}] * 2 + [{"B"}] * 2, {}),
        ("fed-sb", 8, under, [{*"RQP"}] * 2 + [{"R"}] * 2, {}),
        ("rolora", 8, under, [{*"ABQP"}] * 2 + [{*"AB"}] * 2, {"objective.name": "orthogonal"}),
    ):
        grid = run_in_process(
            settings(**flat, **own, **{"rule.name": rule, "lora.rank": rank, "run-name": rule}), nodes=2
        )
        assert said in capsys.readouterr().out
        # What no round changes is sent to each node once.
        assert headers(grid, rule) == parts
        assert not failures(tmp_path / rule)
        before.append(summary(tmp_path / rule)["before"]["all"])
        left, final = read(tmp_path / rule / "adapter").state, newest(tmp_path / rule, rule)
        for layer in final.layers()[:3]:
            torch.testing.assert_close(dense(left, layer), dense(final, layer), rtol=1e-4, atol=1e-5)
    assert before == pytest.approx([before[0]] * len(before), rel=1e-5)


@pytest.mark.slow
def test_a_run_that_started_from_an_adapter_is_resumed(settings, tmp_path):
    flat = {**SHORT, "model.adapter": made(tmp_path), "lora.rank": 4, "rule.name": "ffa-lora"}
    run_in_process(settings(**flat, **{"run-name": "whole"}), nodes=2)
    for rounds, resume in ((1, False), (2, True)):
        again = {"run-name": "parted", "num-server-rounds": rounds, "resume": resume}
        run_in_process(settings(**flat, **again), nodes=2)
    one, two = (newest(tmp_path / name, "ffa-lora") for name in ("whole", "parted"))
    assert digest(one.adapter | one.offset) == digest(two.adapter | two.offset)
    assert one.offset[Key(one.layers()[0], "Q")].shape[1] >= 4


@pytest.mark.slow
def test_what_is_sent_once_is_sent_every_time_where_it_loses_on_the_way(settings, tmp_path):
    flat = {**SHORT, "model.adapter": made(tmp_path), "rule.name": "fed-sb", "wire.down": "bf16"}
    grid = run_in_process(settings(**flat), nodes=2)
    assert headers(grid, "fed-sb") == [{"R", "Q", "P"}] * 4
    assert not failures(tmp_path / "run")


@pytest.mark.slow
def test_a_private_run_starts_from_an_adapter(settings, tmp_path):
    flat = {
        **SHORT,
        "model.adapter": made(tmp_path),
        "rule.name": "ffa-lora",
        "privacy.mode": "example",
        "train.weighting": "uniform",
        "privacy.accountant": "rdp",
        "privacy.records": 400,
        "privacy.expected-batch": 2,
    }
    run_in_process(settings(**flat), nodes=2)
    assert not failures(tmp_path / "run")
    start, end = read(tmp_path / "adapter").state, newest(tmp_path / "run", "ffa-lora")
    layer = end.layers()[0]
    assert torch.equal(end.adapter[Key(layer, "A")], start.adapter[Key(layer, "A")])
    assert not torch.equal(end.adapter[Key(layer, "B")], start.adapter[Key(layer, "B")])
