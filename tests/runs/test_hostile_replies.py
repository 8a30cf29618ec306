"""Replies that a hostile node makes up: refused with a reason, or named, and the run goes on."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common import wire
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State, Update
from server_app.scrutiny import Scrutiny
from strategies import RULES
from tests.support.factors import initial
from tests.support.grid import run_in_process
from tests.support.outcome import events, failures, lines
from tests.support.replies import bare


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
        (RecordDict(), "a malformed answer to the roll call"),
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
        (
            {"loss": 1.0, "correct": 1, "count": 0},
            "a score over no examples: expected a count of 1 to 2,147,483,648, got 0",
        ),
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
