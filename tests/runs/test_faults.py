"""Nodes that fail, are late, or are hostile: refused with a reason, recorded, and the run goes on."""

import json
import re
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common import wire
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State, Update
from common.config.coordinator import RoundConfig
from common.error import BouquetError
from server_app.scrutiny import Scrutiny
from server_app.streaks import Streaks
from strategies import RULES
from tests.support.factors import initial
from tests.support.grid import run_in_process
from tests.support.outcome import events, failures, lines, rounds_of
from tests.support.replies import GONE, bare


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


def repacked(change: Callable[[wire.Header, Update], ArrayRecord]) -> Callable[[RecordDict], RecordDict]:
    """A change of the update that a node has made."""

    def tamper(content: RecordDict) -> RecordDict:
        record = content.array_records["update"]
        header = wire.read_header(record)
        _, update = wire.unpack_update(record, rule=header.rule, round=header.round)
        content["update"] = change(header, update)
        return content

    return tamper


def pack(header: wire.Header, update: Update, **changes: object) -> ArrayRecord:
    facts = {"rule": header.rule, "round": header.round, "node": header.node} | changes
    return wire.pack_update(update, **facts)


def times(factor: float) -> Callable[[wire.Header, Update], ArrayRecord]:
    return lambda header, update: pack(
        header, Update({key: factor * value for key, value in update.tensors.items()}, update.weight, update.scale)
    )


def with_tensor(key: Key, tensor: torch.Tensor) -> Callable[[wire.Header, Update], ArrayRecord]:
    return lambda header, update: pack(header, Update({**update.tensors, key: tensor}, update.weight, update.scale))


def oversized(content: RecordDict) -> RecordDict:
    header = content.array_records["update"]["header"]
    content["update"] = ArrayRecord({"header": header, "values": bare(bytes(80_000_000))})
    return content


def garbage(content: RecordDict) -> RecordDict:
    content["update"] = ArrayRecord({"header": bare(bytes(range(9))), "values": bare(bytes(24))})
    return content


def base_weights(content: RecordDict) -> RecordDict:
    content["model"] = ArrayRecord({"model.embed_tokens.weight": Array(np.zeros((4, 4)))})
    return content


def without_metrics(content: RecordDict) -> RecordDict:
    return RecordDict({"update": content.array_records["update"]})


def nan_metric(content: RecordDict) -> RecordDict:
    content["metrics"] = MetricRecord({**content.metric_records["metrics"], "loss": float("nan")})
    return content


EMBEDDING = Key("model.embed_tokens", "W")
HOSTILE = {
    "garbage": (garbage, "a message header cannot be read"),
    "oversized": (oversized, "an oversized update: expected at most .* bytes, got 80,000,... bytes"),
    "another rule": (repacked(lambda h, u: pack(h, u, rule="flora")), "a message of another rule .*got flora"),
    "NaN": (repacked(times(float("nan"))), "an update out of range .*got nan to nan"),
    "scaled": (repacked(times(1000.0)), "an update that changes too much .*at most 30 .round.max-norm."),
    "replay": (repacked(lambda h, u: pack(h, u, round=h.round + 1)), "an update of another round"),
    "another's name": (repacked(lambda h, u: pack(h, u, node="node-000")), "an update signed by another node"),
    "a base tensor": (repacked(with_tensor(EMBEDDING, torch.zeros(4, 4))), "an update does not fit the rule 'fedit'"),
    "base weights": (base_weights, "a reply without an update: expected one record 'update', got"),
    "no metrics": (without_metrics, "a reply without metrics"),
    "NaN metric": (nan_metric, "a metric is not a number .loss.: expected one number from 0 to .*, got nan"),
    "no reason": (lambda content: RecordDict({"failure": ConfigRecord()}), "no reason given"),
    "nothing": (lambda content: RecordDict(), "a reply without an update"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_update_is_refused_and_the_run_goes_on(name, settings, tmp_path):
    tamper, reason = HOSTILE[name]
    changes = {"num-server-rounds": 1, "round.max-norm": 30.0, "train.learning-rate": 1e-3, "evaluation.every": 0}
    run_in_process(settings(**changes), nodes=3, tamper={1: tamper})
    (said,) = [line["reason"] for line in events(tmp_path, "failure") if line["during"] == "train"]
    assert re.search(reason, said)
    (merge,) = [line for line in lines(tmp_path / "run") if line["phase"] == "merge"]
    assert (merge["nodes"], merge["asked"]) == (2, 3)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_a_sign_flipped_update_is_named(settings, tmp_path, capsys):
    """Well formed and of the usual size, it cannot be refused; but it is told."""
    flipped = []

    def flip(header: wire.Header, update: Update) -> ArrayRecord:
        start = initial(RULES["fedit"](), spec(update)).adapter
        flipped.append(header.node)
        return pack(
            header, Update({k: 2 * start[k] - v for k, v in update.tensors.items()}, update.weight, update.scale)
        )

    run_in_process(
        settings(**{"num-server-rounds": 1, "data.partition": "iid", "evaluation.every": 0}),
        nodes=4,
        tamper={2: repacked(flip)},
    )
    against = [line for line in lines(tmp_path / "run") if line["phase"] == "against"]
    assert [line["node"] for line in against] == flipped == ["node-002"]
    assert "node-002 went against the other nodes" in capsys.readouterr().out


def spec(update: Update):
    layers = {
        key.layer: LayerShape(update.tensors[Key(key.layer, "B")].shape[0], tensor.shape[1])
        for key, tensor in update.tensors.items()
        if key.part == "A"
    }
    return Spec(layers=layers, head={}, rank=8, scale=2.0)


@pytest.mark.parametrize("rule", ["flora", "flexlora", "florist", "fedmomentum"])
def test_the_norm_of_a_change_counts_from_what_the_node_received(rule):
    state = State({Key("l", "A"): torch.randn(4, 6), Key("l", "B"): torch.zeros(5, 4)}, 1.0)
    made = RULES[rule]()
    received = made.view(state, 2).adapter
    update = Update({key: tensor + 0.5 for key, tensor in received.items()}, 1.0, 1.0)
    numel = sum(tensor.numel() for tensor in received.values())
    assert Scrutiny(made, state, 0.0).examine("n", update) == pytest.approx(0.5 * numel**0.5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (RecordDict(), "an answer to the roll call of unknown form"),
        (RecordDict({"node": ConfigRecord({"name": "../x", "rank": 8})}), "expected a name of letters a to z, digits"),
        (RecordDict({"node": ConfigRecord({"name": "x", "rank": "many"})}), "got 'x', 'many'"),
    ],
)
def test_a_hostile_answer_to_the_roll_call_is_left_out(answer, reason, settings, tmp_path):
    run_in_process(settings(**{"num-server-rounds": 1}), nodes=3, tamper={1: lambda content: answer}, tampered="query")
    (said,) = failures(tmp_path / "run")
    assert reason in said


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"loss": float("inf"), "correct": 1, "count": 2}, "a metric is not a number"),
        ({"loss": 1.0, "correct": 1, "count": 0}, "a score of nothing: expected a count of 1 to 2,147,483,648, got 0"),
        ({"loss": 1.0}, "a reply lacks metrics: expected loss, correct, count, got none named correct, count"),
    ],
)
def test_a_hostile_score_is_left_out(metrics, reason, settings, tmp_path):
    answer = RecordDict({"metrics": MetricRecord(metrics)})
    changes = {"num-server-rounds": 1, "round.max-failures": 0}
    run_in_process(settings(**changes), nodes=2, tamper={1: lambda content: answer}, tampered="evaluate")
    (said,) = failures(tmp_path / "run")
    assert reason in said
    assert [line["asked"] for line in events(tmp_path, "evaluation")] == [1], "the last state goes to who has scored"
