"""kill -9 at any moment: what was finished is kept, and a resumed run ends where an unbroken one does."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from client_app.memory import KEPT, Memory
from common.adapter.values import Key, State
from common.error import BouquetError
from common.record import checkpoint
from tests.support import ROOT
from tests.support.grid import run_in_process
from tests.support.outcome import lines
from tests.support.processes import wait_for

SCRIPT = """
import json, sys
from client_app import memory
from server_app import nodes
from tests.support.grid import run_in_process
nodes.STEADY_SECONDS, nodes.POLL_SECONDS = 0.0, 0.01
run_in_process(json.loads(sys.argv[1]), nodes=2, node_config={
    number: {"state-directory": sys.argv[2]} for number in range(2)})
"""


def run(config: dict, state: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, json.dumps(config), str(state)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rounds(folder: Path) -> list[int]:
    return sorted(int(file.stem.split("-")[1]) for file in folder.glob("checkpoints/round-*.safetensors"))


@pytest.mark.exhaustive
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(settings, tmp_path):
    """The coordinator and its nodes in one process, killed again and again, each time with more of the run done."""
    whole = settings(**{"num-server-rounds": 8, "rule.name": "fedsa-lora", "run-name": "whole", "evaluation.every": 0})
    run_in_process(whole, nodes=2)
    broken = whole | {"run-name": "broken", "resume": True}
    moments, kills = random.Random(0), 0
    for target in (1, 3, 6):
        process = run(broken, tmp_path / "two")
        wait_for(lambda target=target: (rounds(tmp_path / "broken") or [0])[-1] >= target, "a round", pause=0.01)
        time.sleep(moments.uniform(0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.wait()
        kept = rounds(tmp_path / "broken")
        assert kept == list(range(kept[0], kept[-1] + 1))
        assert min(3, kept[-1]) <= len(kept) <= 4, "a kill may fall before the oldest is removed"
    assert run(broken, tmp_path / "two").wait(240) == 0
    assert kills >= 2
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    assert two["rounds"] == 8
    assert one["adapter_digest"] == two["adapter_digest"]
    merged = [line["round"] for line in lines(tmp_path / "broken") if line["phase"] == "merge"]
    assert len(merged) == len(set(merged)), "a finished round was run again"


def test_a_round_asked_for_again_starts_from_the_factors_of_then(tmp_path):
    """The node had finished the round; the coordinator was killed before it had."""
    memory = Memory(tmp_path, "run", "node-000")
    for number in range(1, 7):
        memory.save("personal", {Key("l", "B"): torch.full((1,), float(number))}, number)
    kept = [float(memory.load("personal", number).get(Key("l", "B"), torch.tensor([0.0]))) for number in range(8)]
    assert kept == [0, 0, 0, 0, 4, 5, 6, 6]
    assert len(list(tmp_path.rglob("personal-*.safetensors"))) == KEPT
    assert {file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.safetensors")} == {0o600}


def test_what_a_run_of_another_privacy_mode_kept_is_not_found(tmp_path):
    """Factors of a plain run under the name of a private one would tell what the private one's noise does not cover."""
    for kept, other in (("none", "example"), ("update-local", "example"), ("example", "none")):
        memory = Memory(tmp_path / kept, "run", "node-000", kept)
        memory.save("personal", {Key("l", "B"): torch.ones(1)}, 1)
        memory.rank, memory.clip = 2, 3.0
        stranger = Memory(tmp_path / kept, "run", "node-000", other)
        assert (stranger.load("personal", 5), stranger.rank, stranger.clip) == ({}, 0, 0.0)


def test_a_torn_line_of_the_record_does_not_spoil_the_next(settings, tmp_path):
    run_in_process(settings(**{"num-server-rounds": 1}), nodes=2)
    record = tmp_path / "run/metrics.jsonl"
    record.write_text(record.read_text() + '{"phase": "me')
    run_in_process(settings(resume=True), nodes=2)
    broken = [line for line in record.read_text().splitlines() if not line.endswith("}")]
    assert broken == ['{"phase": "me']
    assert json.loads(record.read_text().splitlines()[-1])["phase"] == "judged"


def test_a_full_disk_is_named_and_the_checkpoint_before_it_stays(tmp_path, monkeypatch):
    state = State({Key("l", "A"): torch.ones(2, 2)}, 1.0, 1)
    checkpoint.save(tmp_path, state, "fedit")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("common.durable.os.fsync", full)
    with pytest.raises(BouquetError, match=r"a checkpoint cannot be written .*No space left.*resume = true"):
        checkpoint.save(tmp_path, State(state.adapter, 1.0, 2), "fedit")
    assert checkpoint.latest(tmp_path, "fedit").round == 1
