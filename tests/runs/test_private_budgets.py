"""What the nodes of private runs are charged, and what a node with a budget refuses."""

import json
import re
from pathlib import Path

import pytest
from flwr.app import RecordDict

from client_app import audit
from common.config.node import witness_of
from common.error import QuorumError
from common.privacy import accounting, ledger
from common.privacy.accounting import Release
from strategies import read_config
from tests.support.grid import NAMED, run_in_process, with_budget
from tests.support.outcome import events
from tests.support.private_runs import KEPT, PRIVATE, spent


def cost(rounds: int) -> float:
    """Epsilon after so many rounds, planned for three."""
    release = accounting.plan(read_config(PRIVATE).privacy, KEPT, steps_per_round=3, rounds=3)
    return accounting.epsilon([release] * rounds, 1e-5, "rdp")


def test_the_run_costs_what_was_planned(settings, tmp_path):
    flat = settings(**PRIVATE)
    run_in_process(flat, nodes=2)
    config = read_config(flat)
    release = accounting.plan(config.privacy, KEPT, config.train.steps, config.num_server_rounds)
    for node in ("node-000", "node-001"):
        own = spent(tmp_path, node)
        assert [row.release for row in own] == [release] * 3
        assert [(row.run, row.round, row.rule, row.mechanism) for row in own] == [
            ("run", turn, "ffa-lora", "example") for turn in (1, 2, 3)
        ]
        assert [row.epsilon for row in own] == [accounting.epsilon([release] * n, 1e-5, "rdp") for n in (1, 2, 3)]
        assert config.privacy.epsilon - 0.01 <= own[-1].epsilon <= config.privacy.epsilon


def test_a_node_whose_budget_is_spent_refuses_and_the_run_goes_on(settings, tmp_path):
    flat = settings(**PRIVATE, **{"round.min-replies": 1.0, "min-nodes": 1})
    grid = run_in_process(flat, nodes=2, node_config={1: with_budget(tmp_path / "ward", cost(1))})
    (failure,) = events(tmp_path, "failure")
    assert (failure["node"], failure["round"], failure["during"]) == ("node-001", 2, "train")
    assert re.fullmatch(
        r"the privacy budget of this node is spent \(node-001, privacy-epsilon\): expected at most epsilon [\d.]+ at "
        r"delta 1e-05 over all runs, got more with this round. Its operator can see what was spent with .*",
        failure["reason"],
    )
    assert [line["nodes"] for line in events(tmp_path, "merge")] == [2, 1, 1]
    asked = [message.metadata.dst_node_id for message in grid.sent if message.metadata.message_type == "train"]
    assert asked == [1000, 1001, 1000, 1001, 1000]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_budgets_hold_over_runs_and_a_run_that_nobody_can_go_on_with_ends(settings, tmp_path, capsys):
    budgets = {number: with_budget(tmp_path / f"ward-{number}", cost(4)) for number in (0, 1)}

    def go(name):
        flat = settings(**PRIVATE, **{"run-name": name})
        run_in_process(flat, nodes=2, node_config=budgets)
        return [line["nodes"] for line in events(tmp_path, "merge", name)]

    assert go("one") == [2, 2, 2]
    with pytest.raises(QuorumError, match=r"too few nodes: expected 2 within 0.3 s .*got 0"):
        go("two")
    assert [line["nodes"] for line in events(tmp_path, "merge", "two")] == [2]
    assert "stopped after round 1: too few nodes" in capsys.readouterr().out
    assert json.loads((tmp_path / "two/summary.json").read_text())["ended"] == "too few nodes"
    assert (tmp_path / "two/adapter/adapter_model.safetensors").exists()
    with pytest.raises(QuorumError, match="got 0"):
        go("three")
    for number in (0, 1):
        folder = tmp_path / f"ward-{number}"
        assert max(row.epsilon for row in ledger.read(folder, witness_of(folder))) == cost(4)


def test_a_node_with_a_budget_takes_no_part_in_a_run_without_noise(settings, tmp_path):
    flat = settings(**{"num-server-rounds": 1, "min-nodes": 1})
    run_in_process(flat, nodes=2, node_config={1: with_budget(tmp_path / "ward", 8.0)})
    (failure,) = events(tmp_path, "failure")
    assert failure["reason"].splitlines() == [
        "this node's policy does not allow it:",
        "  privacy.mode: expected example or update-local, got 'none'",
        "  privacy.mode: expected a private run (privacy-epsilon), got 'none'",
    ]


def test_a_node_with_a_budget_answers_only_what_its_policy_names(settings, tmp_path):
    silent = tmp_path / "silent.toml"
    silent.write_text('[data]\nsources = ["*"]\n')
    budget = with_budget(tmp_path / "ward", 8.0, str(silent))
    run_in_process(settings(**PRIVATE, **{"min-nodes": 1}), nodes=2, node_config={1: budget})
    (failure,) = events(tmp_path, "failure")
    assert failure["reason"].splitlines()[1:] == [
        f"  {key}: expected in the policy of a node with a budget (privacy-epsilon), got nothing"
        for key in ("rules", "models", "[task]", "privacy.modes")
    ]
    assert not (tmp_path / "ward/ledger.sqlite").exists()


def test_a_coordinators_delta_does_not_make_a_run_look_cheap(settings, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text(Path(NAMED).read_text() + "max-epsilon = 8.0\n")
    flat = settings(**{**PRIVATE, "privacy.delta": 0.1, "num-server-rounds": 1})
    run_in_process(flat, nodes=2, node_config={1: with_budget(tmp_path / "ward", 100.0, str(file))})
    (failure,) = events(tmp_path, "failure")
    assert "max-epsilon" in failure["reason"]
    assert "at delta 1e-05" in failure["reason"]


@pytest.mark.slow
def test_a_round_that_is_tried_again_is_charged_again_within_the_plan(settings, tmp_path, capsys):
    replies = []

    def loses_the_first(content: RecordDict) -> RecordDict | None:
        replies.append(content)
        return content if len(replies) > 1 else None

    flat = settings(**PRIVATE, **{"round.min-replies": 1.0, "round.deadline": 3.0})
    with pytest.raises(QuorumError):
        run_in_process(flat, nodes=2, tamper={1: loses_the_first})
    rows = spent(tmp_path)
    assert [row.round for row in rows] == [1, 1, 2] * 2
    reasons = [failure["reason"] for failure in events(tmp_path, "failure") if failure["round"] == 3]
    assert len(reasons) == 2
    assert "this run has spent the epsilon that it declared" in reasons[0]
    assert "stopped after round 2" in capsys.readouterr().out
    assert max(row.epsilon for row in rows) <= 8.0


def test_a_resumed_run_charges_each_thing_it_gives_away_once(settings, tmp_path):
    """Broken off in the second round, after the charge: that round is done and charged again, and no score is."""
    flat = settings(
        **PRIVATE
        | {"privacy.noise-multiplier": 2.0, "privacy.score-noise": 4.0, "num-server-rounds": 2, "min-nodes": 1}
    )
    replies = []

    def breaks_the_second(content: RecordDict) -> RecordDict:
        replies.append(content)
        if len(replies) == 2:
            raise KeyboardInterrupt
        return content

    with pytest.raises(KeyboardInterrupt):
        run_in_process(flat, nodes=1, tamper={0: breaks_the_second})
    grid = run_in_process(flat | {"resume": True}, nodes=1)
    trained, scored = Release(2.0, 8 / 36, 3), Release(4.0, 1.0, 1)
    rows = spent(tmp_path, "node-000")
    assert [(row.run, row.round, row.release) for row in rows] == [
        ("run", 0, scored),
        ("run", 1, trained),
        ("run", 1, scored),
        ("run", 2, trained),
        ("run", 2, trained),
        ("run", 2, scored),
    ]
    assert rows[-1].epsilon == accounting.epsilon([trained] * 3 + [scored] * 3, 1e-5, "rdp")
    assert [kind for kind, _ in grid.returned] == ["query", "train", "evaluate"]
    # What left is told by the same names: a score and an update that leave together in one line, by the later row.
    sent = [json.loads(line) for line in audit.path(tmp_path / "state").read_text().splitlines()]
    charged = [(line["run"], line["round"], line["epsilon"]) for line in sent if line["epsilon"]]
    assert charged == [(row.run, row.round, row.epsilon) for row in (rows[1], rows[3], rows[4], rows[5])]
