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
from tests.support.adapters import dense
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


@pytest.mark.slow
def test_a_run_goes_on_from_the_adapter_of_another(settings, tmp_path, capsys):
    first = {"train.learning-rate": 0.02, "train.steps": 8, "evaluation.export": "last"}
    run_in_process(settings(**first, **{"run-name": "first"}), nodes=2)
    adapter = tmp_path / "first" / "adapter"
    base, ended = (summary(tmp_path / "first")[when]["all"] for when in ("before", "after"))
    assert ended < 0.95 * base

    same = settings(**first, **{"run-name": "same", "model.adapter": str(adapter)})
    run_in_process(same, nodes=2)
    said = capsys.readouterr().out
    assert f"starts from the adapter {adapter}: rank 8 in 42 layers; it is the factors" in said
    assert summary(tmp_path / "same")["before"]["all"] == pytest.approx(ended, rel=1e-6)
    assert summary(tmp_path / "same")["after"]["all"] < ended
    # The export stands by itself: it tells neither where the adapter was nor needs it.
    exported = read(tmp_path / "same" / "adapter")
    assert exported.state.rank == 8
    assert not [key for key in exported.settings if key.startswith("model.adapter")]

    # Frames of its own: the adapter is the offset, and each node is sent it once.
    framed = settings(**first, **{"run-name": "framed", "model.adapter": str(adapter), "rule.name": "fed-sb"})
    grid = run_in_process(framed, nodes=2)
    assert "it is the offset under a start of its own" in capsys.readouterr().out
    assert summary(tmp_path / "framed")["before"]["all"] == pytest.approx(ended, rel=1e-5)
    assert summary(tmp_path / "framed")["after"]["all"] < ended
    assert headers(grid, "fed-sb") == [{"R", "Q", "P"}] * 2 + [{"R"}] * 2
    assert not failures(tmp_path / "framed")
    whole, final = read(tmp_path / "framed" / "adapter").state, newest(tmp_path / "framed", "fed-sb")
    for layer in final.layers()[:3]:
        torch.testing.assert_close(dense(whole, layer), dense(final, layer), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_smaller_run_keeps_the_whole_adapter_and_is_resumed(settings, tmp_path, capsys):
    run_in_process(settings(**{"run-name": "first", "train.learning-rate": 0.02}), nodes=2)
    adapter, ended = tmp_path / "first" / "adapter", summary(tmp_path / "first")["after"]["all"]
    flat = {"lora.rank": 4, "rule.name": "ffa-lora", "model.adapter": str(adapter), "num-server-rounds": 3}
    grid = run_in_process(settings(**flat, **{"run-name": "whole"}), nodes=2)
    assert "% of its energy is in the factors, the rest is the offset" in capsys.readouterr().out
    assert summary(tmp_path / "whole")["before"]["all"] == pytest.approx(ended, rel=1e-5)
    assert headers(grid, "ffa-lora") == [{"A", "B", "Q", "P"}] * 2 + [{"B"}] * 4
    for rounds, resume in ((2, False), (3, True)):
        again = {**flat, "run-name": "parted", "num-server-rounds": rounds, "resume": resume}
        again |= {"train.schedule": "constant", "train.warmup": 0.0}
        run_in_process(settings(**again), nodes=2)
    constant = {**flat, "run-name": "constant", "train.schedule": "constant", "train.warmup": 0.0}
    run_in_process(settings(**constant), nodes=2)
    one, two = (newest(tmp_path / name, "ffa-lora") for name in ("constant", "parted"))
    assert digest(one.adapter | one.offset) == digest(two.adapter | two.offset)
    assert one.offset[Key(one.layers()[0], "Q")].shape[1] == 4


@pytest.mark.slow
def test_what_is_sent_once_is_sent_every_time_where_it_loses_on_the_way(settings, tmp_path):
    run_in_process(settings(**{"run-name": "first", "num-server-rounds": 1, "evaluation.every": 0}), nodes=2)
    flat = {"model.adapter": str(tmp_path / "first" / "adapter"), "rule.name": "fed-sb", "wire.down": "bf16"}
    grid = run_in_process(settings(**flat, **{"run-name": "coarse"}), nodes=2)
    assert headers(grid, "fed-sb") == [{"R", "Q", "P"}] * 4
    assert not failures(tmp_path / "coarse")


@pytest.mark.slow
def test_a_private_run_starts_from_an_adapter(settings, tmp_path):
    run_in_process(settings(**{"run-name": "first", "num-server-rounds": 1, "evaluation.every": 0}), nodes=2)
    flat = {
        "model.adapter": str(tmp_path / "first" / "adapter"),
        "rule.name": "ffa-lora",
        "privacy.mode": "example",
        "train.weighting": "uniform",
        "privacy.accountant": "rdp",
        "privacy.records": 400,
        "privacy.expected-batch": 8,
        "run-name": "private",
    }
    run_in_process(settings(**flat), nodes=2)
    assert not failures(tmp_path / "private")
    start, end = read(tmp_path / "first" / "adapter").state, newest(tmp_path / "private", "ffa-lora")
    layer = end.layers()[0]
    assert torch.equal(end.adapter[Key(layer, "A")], start.adapter[Key(layer, "A")])
    assert not torch.equal(end.adapter[Key(layer, "B")], start.adapter[Key(layer, "B")])
