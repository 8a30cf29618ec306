"""Nodes that fail or are late sit out, with a reason that steers nothing, and the run goes on."""

import json
import re
import time

import pytest
from flwr.app import ConfigRecord, RecordDict

from common.config.coordinator import RoundConfig
from common.error import BouquetError
from server_app.streaks import Streaks
from tests.support.grid import run_in_process
from tests.support.outcome import failures, lines, rounds_of
from tests.support.replies import GONE


def test_a_node_that_keeps_failing_sits_out_and_comes_back(settings, tmp_path):
    asked = []

    def fails_twice(content: RecordDict) -> RecordDict:
        asked.append(1)
        return GONE if len(asked) <= 2 else content

    changes = {"num-server-rounds": 6, "round.max-failures": 2, "round.sit-out": 2, "evaluation.every": 0}
    run_in_process(settings(**changes), nodes=3, tamper={1: fails_twice})
    assert rounds_of(tmp_path / "run", "node-001", "failure") == [1, 2]
    assert rounds_of(tmp_path / "run", "node-001") == [5, 6]
    assert rounds_of(tmp_path / "run", "node-000") == [1, 2, 3, 4, 5, 6]
    (event,) = [line for line in lines(tmp_path / "run") if line["phase"] == "sit-out"]
    assert (event["node"], event["failures"], event["rounds"]) == ("node-001", 2, 2)
    assert json.loads((tmp_path / "run/summary.json").read_text())["failures"] == {"node-001": 2}


def test_a_node_that_fails_again_after_sitting_out_sits_out_at_once(settings, tmp_path):
    changes = {"num-server-rounds": 6, "round.max-failures": 2, "round.sit-out": 1, "evaluation.every": 0}
    run_in_process(settings(**changes), nodes=3, tamper={1: lambda content: GONE})
    assert rounds_of(tmp_path / "run", "node-001", "failure") == [1, 2, 4, 6]


def test_a_node_that_scores_and_never_trains_sits_out(settings, tmp_path):
    changes = {"num-server-rounds": 4, "round.max-failures": 2, "round.sit-out": 2}
    run_in_process(settings(**changes), nodes=3, tamper={1: lambda content: GONE})
    assert rounds_of(tmp_path / "run", "node-001", "failure") == [1, 2]
    assert rounds_of(tmp_path / "run", "node-001", "sit-out") == [2]


def test_a_failure_to_train_and_one_to_score_in_a_round_are_one():
    streaks, said = Streaks(RoundConfig.model_validate({"max-failures": 1})), []
    for phase, number in (("train", 1), ("evaluate", 1), ("train", 2)):
        streaks.begin()
        streaks.fail("a")
        said.append([pause.failures for pause in streaks.count(["a"], phase, number)])
    assert said == [[1], [], [2]]


def test_a_node_that_is_silent_at_the_first_roll_call_holds_up_nobody(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("server_app.nodes.LATECOMER_SECONDS", 0.2)
    changes = {"num-server-rounds": 1, "evaluation.every": 0, "round.deadline": 60.0}
    began = time.monotonic()
    run_in_process(settings(**changes), nodes=3, tamper={1: lambda content: None}, tampered="query")
    assert time.monotonic() - began < 50
    assert rounds_of(tmp_path / "run", "node-000") == [1]


def test_only_the_node_that_was_asked_continues_the_prompt(settings, tmp_path, capsys):
    def unasked(content: RecordDict) -> RecordDict:
        content["sample"] = ConfigRecord({"text": "def never_asked"})
        return content

    changes = {"num-server-rounds": 1, "evaluation.prompt": "def "}
    run_in_process(settings(**changes), nodes=2, tamper={1: unasked}, tampered="evaluate")
    said = capsys.readouterr().out
    assert "before:\n    def " in said
    assert "never_asked" not in said


def test_no_line_of_a_nodes_reason_passes_for_one_of_the_runs(settings, tmp_path, capsys):
    forged = RecordDict({"failure": ConfigRecord({"reason": "gone\nround 1/1  loss 0.001\radapter: /tmp/evil"})})
    changes = {"num-server-rounds": 1, "evaluation.every": 0}
    run_in_process(settings(**changes), nodes=2, tamper={1: lambda content: forged})
    said = capsys.readouterr().out
    assert (
        "    node-001 left out of train: gone\n        | round 1/1  loss 0.001\n        | adapter: /tmp/evil\n" in said
    )


def test_if_all_nodes_should_sit_out_all_are_asked(settings, tmp_path):
    changes = {"num-server-rounds": 1, "round.max-failures": 1, "round.retries": 1, "round.sit-out": 9}
    calls = []

    def fails_once(content: RecordDict) -> RecordDict:
        calls.append(1)
        return GONE if len(calls) <= 2 else content

    run_in_process(settings(**changes), nodes=2, tamper=dict.fromkeys((0, 1), fails_once))
    assert rounds_of(tmp_path / "run", "node-001") == [1]


def test_a_minimum_number_of_replies_counts_too(settings):
    changes = {"round.min-replies": 0.1, "round.fewest-replies": 2, "round.retries": 0}
    with pytest.raises(BouquetError, match="round 1 failed 1 times"):
        run_in_process(settings(**changes), nodes=2, tamper={1: lambda content: GONE})


def test_a_late_reply_is_counted_and_not_used(settings, tmp_path):
    changes = {
        "num-server-rounds": 3,
        "round.deadline": 2.5,
        "evaluation.every": 0,
        "round.max-failures": 1,
        "min-nodes": 1,
    }
    run_in_process(settings(**changes), nodes=2, late={1: 2.7})
    assert failures(tmp_path / "run") == ["no reply within 2.5 s (round.deadline)"]
    assert rounds_of(tmp_path / "run", "node-001", "late") == [0]
    assert rounds_of(tmp_path / "run", "node-001") == []
    assert json.loads((tmp_path / "run/summary.json").read_text())["late"] == {"node-001": 1}


def test_a_defect_on_a_node_shows_its_innermost_frames_at_the_coordinator(settings, tmp_path, monkeypatch, capsys):
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("client_app.session.train", broken)
    with pytest.raises(BouquetError, match="round 1 failed"):
        run_in_process(settings(**{"round.retries": 0}), nodes=2)
    reason = failures(tmp_path / "run")[0]
    assert reason.startswith("ZeroDivisionError: a defect\nTraceback (most recent call last):")
    assert "in broken\n" in reason
    assert len(re.findall(r'^  File "', reason, flags=re.MULTILINE)) <= 6
    assert "ZeroDivisionError: a defect" in capsys.readouterr().out


def test_what_a_node_writes_steers_no_terminal(settings, tmp_path, capsys):
    steering = RecordDict({"failure": ConfigRecord({"reason": "gone\x1b[2J"})})
    changes = {"num-server-rounds": 1, "round.min-replies": 0.5}
    run_in_process(settings(**changes), nodes=2, tamper={1: lambda content: steering})
    assert "gone\ufffd[2J" in (said := capsys.readouterr().out)
    assert "\x1b" not in said
    assert failures(tmp_path / "run") == ["gone\x1b[2J"]
