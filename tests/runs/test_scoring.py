"""One message a round: a node scores the state that it trains from, and the score comes with its update."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from flwr.app import ConfigRecord, MessageType, MetricRecord, RecordDict

from client_app.session import Session
from common.error import QuorumError
from common.record import checkpoint
from strategies import Recipe
from strategies.strategy import LoraStrategy, Recipient
from tests.support.grid import asks_for_score, run_in_process
from tests.support.outcome import events, failures, rounds_of
from tests.support.private_runs import PRIVATE, spent
from tests.support.replies import GONE

DIVERGING = {"num-server-rounds": 6, "train.learning-rate": 0.5, "train.schedule": "constant", "train.clip-norm": 0.0}


@pytest.fixture
def settings(settings: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """One step over a base that a CPU is quick with: what is tried here is what is sent, and when."""
    small = {"model.quantization": "none", "lora.targets": "q_proj,v_proj", "task.max-length": 16, "data.limit": 20}
    return partial(settings, **small, **{"train.steps": 1, "evaluation.limit": 2})


def kinds(grid) -> list[str]:
    """What was sent, in order."""
    return [
        "score and train" if kind == "train" and asks_for_score(message) else kind
        for message in grid.sent
        for kind in [message.metadata.message_type]
    ]


@pytest.mark.parametrize("rule", ["fedit", "fedsa-lora"])
def test_a_score_that_comes_with_an_update_is_the_one_that_a_message_of_its_own_brings(rule, settings, tmp_path):
    config = settings(**{"rule.name": rule})
    grid = run_in_process(config, nodes=2)
    assert kinds(grid) == ["query"] * 2 + ["score and train"] * 4 + ["evaluate"] * 2
    told = {(line["round"], line["node"]): line for line in events(tmp_path, "evaluate")}
    assert set(told) == {(turn, node) for turn in (0, 1, 2) for node in ("node-000", "node-001")}
    strategy = LoraStrategy(Recipe.read(config))
    state = checkpoint.load(checkpoint.file_of(tmp_path / "run/checkpoints", 1), rule)
    messages = strategy.messages(MessageType.EVALUATE, state, [Recipient(1000), Recipient(1001)])
    nodes = {1000: "node-000", 1001: "node-001"}
    replies = {nodes[reply.metadata.src_node_id]: reply for reply in grid.send_and_receive(messages)}
    assert set(replies) == {"node-000", "node-001"}
    for node, reply in replies.items():
        scored = reply.content.metric_records["metrics"]
        assert scored["loss"] == told[1, node]["loss"]
        assert scored["perplexity"] == told[1, node]["score"]


def test_what_is_not_due_is_not_scored(settings):
    grid = run_in_process(settings(**{"num-server-rounds": 3, "evaluation.every": 2}), nodes=2)
    rounds = ["score and train"] * 2 + ["train"] * 2 + ["score and train"] * 2
    assert kinds(grid) == ["query"] * 2 + rounds + ["evaluate"] * 2


def test_a_share_of_those_that_train_scores(settings, tmp_path):
    changes = {"num-server-rounds": 2, "fraction-train": 0.5, "fraction-evaluate": 0.5}
    run_in_process(settings(**changes), nodes=4)
    for turn in (0, 1):
        (scored,) = {line["node"] for line in events(tmp_path, "evaluate") if line["round"] == turn}
        (asked,) = [line["nodes"] for line in events(tmp_path, "asked") if line["round"] == turn + 1]
        assert scored in asked
        assert len(asked) == 2
    assert len([line for line in events(tmp_path, "evaluate") if line["round"] == 2]) == 2


def test_a_node_that_cannot_score_trains_all_the_same(settings, tmp_path, monkeypatch):
    def broken(self, message):
        raise MemoryError("no room for a score")

    monkeypatch.setattr(Session, "evaluate", broken)
    run_in_process(settings(**{"num-server-rounds": 1, "round.max-failures": 0}), nodes=2)
    assert [line["nodes"] for line in events(tmp_path, "merge")] == [2]
    assert [(line["during"], line["round"]) for line in events(tmp_path, "failure")] == [("evaluate", 0)] * 2 + [
        ("evaluate", 1)
    ] * 2
    assert failures(tmp_path / "run")[0].startswith("MemoryError: no room for a score\n")


def test_a_node_that_cannot_train_has_scored_all_the_same(settings, tmp_path, monkeypatch):
    train = Session.train

    def broken(self, message):
        if self.node.label == "node-001":
            raise MemoryError("no room for training")
        return train(self, message)

    monkeypatch.setattr(Session, "train", broken)
    run_in_process(settings(**{"num-server-rounds": 1}), nodes=2)
    assert rounds_of(tmp_path / "run", "node-001", "evaluate") == [0, 1]
    assert [(line["during"], line["round"]) for line in events(tmp_path, "failure")] == [("train", 1)]


def test_a_node_that_does_neither_fails_once(settings, tmp_path):
    run_in_process(settings(**{"num-server-rounds": 1}), nodes=2, tamper={1: lambda content: GONE})
    assert [line["during"] for line in events(tmp_path, "failure")] == ["train"]


def test_a_score_that_nobody_asked_for_is_not_looked_at(settings, tmp_path):
    def unasked(content: RecordDict) -> RecordDict:
        content["score"] = MetricRecord({"loss": 0.0, "correct": 1, "count": 1})
        content["unscored"] = ConfigRecord({"reason": "never"})
        return content

    changes = {"num-server-rounds": 2, "evaluation.every": 0, "fraction-evaluate": 0.5}
    run_in_process(settings(**changes), nodes=2, tamper={0: unasked, 1: unasked})
    scored = [line for line in events(tmp_path, "evaluate") if line["round"] == 1]
    assert scored == []
    assert {line["during"] for line in events(tmp_path, "failure")} <= {"evaluate"}
    assert len(events(tmp_path, "failure")) == 1, "of the one that was asked"


def test_a_run_that_stops_early_drops_the_round_that_told_it_so(settings, tmp_path):
    grid = run_in_process(settings(**DIVERGING, **{"round.patience": 1}), nodes=2)
    judged = {line["round"]: line["by"] for line in events(tmp_path, "judged")}
    (dropped,) = events(tmp_path, "dropped")
    assert dropped["round"] == max(judged) + 1
    assert "evaluate" not in kinds(grid), "the last state that counts has its score"
    assert checkpoint.latest(tmp_path / "run/checkpoints", "fedit").round == max(judged)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["rounds"] == min(judged, key=judged.get)
    told = [*events(tmp_path, "merge"), dropped]
    for way in ("bytes_up", "bytes_down"):
        assert summary[way] == sum(line[way] for line in told) > 0
    report = (tmp_path / "run/report.html").read_text()
    assert "The round was not merged: the scores that arrived with it ended the run at the round before." in report


@pytest.mark.slow
def test_a_private_run_does_not_pay_for_a_round_that_is_dropped(settings, tmp_path):
    """The score that may end the run is asked for alone."""
    changes = PRIVATE | {"privacy.noise-multiplier": 2.0, "privacy.score-noise": 1000.0, "num-server-rounds": 6}
    grid = run_in_process(settings(**changes, **{"round.patience": 1}), nodes=2)
    merged = len(events(tmp_path, "merge"))
    assert merged < 6
    assert events(tmp_path, "dropped") == []
    rows = spent(tmp_path, "node-000")
    assert [row.round for row in rows if row.sample_rate < 1] == list(range(1, merged + 1))
    assert (
        kinds(grid)
        == ["query"] * 2
        + ["score and train"] * 2
        + (["evaluate"] * 2 + ["train"] * 2) * (merged - 1)
        + ["evaluate"] * 2
    )


def test_a_private_score_is_asked_and_paid_for_once_where_its_round_is_tried_again(settings, tmp_path):
    answers = iter((GONE,))
    changes = PRIVATE | {"privacy.noise-multiplier": 2.0, "privacy.score-noise": 4.0, "num-server-rounds": 1}
    grid = run_in_process(
        settings(**changes, **{"round.min-replies": 1.0}),
        nodes=2,
        tamper={1: lambda content: next(answers, content)},
    )
    assert kinds(grid) == ["query"] * 2 + ["score and train"] * 2 + ["train"] * 2 + ["evaluate"]
    for node, last in (("node-000", [(1, True)]), ("node-001", [])):  # of the second no score has come
        rows = [(row.round, row.sample_rate == 1.0) for row in spent(tmp_path, node)]
        assert rows == [(0, True), (1, False), (1, False), *last]


def test_a_plain_score_that_is_missing_is_asked_for_again(settings, tmp_path):
    answers = iter((GONE,))
    grid = run_in_process(
        settings(**{"round.min-replies": 1.0, "num-server-rounds": 1}),
        nodes=2,
        tamper={1: lambda content: next(answers, content)},
    )
    assert kinds(grid)[2:] == ["score and train"] * 2 + ["train", "score and train"] + ["evaluate"] * 2
    assert [line["node"] for line in events(tmp_path, "evaluate") if not line["round"]] == ["node-000", "node-001"]
    assert len([line for line in events(tmp_path, "heldout") if not line["round"]]) == 1


def test_a_run_that_too_few_nodes_end_has_its_last_state_scored(settings, tmp_path):
    calls = []

    def fails_from_the_second_round(content: RecordDict) -> RecordDict:
        calls.append(1)
        return content if len(calls) == 1 else GONE

    changes = {"round.min-replies": 1.0, "round.retries": 0, "round.max-failures": 0}
    with pytest.raises(QuorumError):
        run_in_process(settings(**changes), nodes=2, tamper={1: fails_from_the_second_round})
    assert [line["round"] for line in events(tmp_path, "heldout")] == [0, 1]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] == events(tmp_path, "heldout")[-1]["score"]
