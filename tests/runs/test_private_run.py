"""Private runs in one process: what they cost, what leaves the nodes, and who refuses what."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from client_app import audit
from client_app.scoring import noised_score
from common import tasks, wire
from common.config.node import witness_of
from common.config.run import TaskConfig
from common.error import BouquetError, QuorumError
from common.privacy import accounting, ledger
from common.privacy.accounting import Release
from common.tasks import Score
from strategies import read_config
from tests.support.architectures import tiny_bert
from tests.support.grid import NAMED, run_in_process, with_budget
from tests.support.outcome import events
from tests.support.private_runs import PRIVATE, spent

# Of 400 records data.limit keeps a tenth, each by its own content.
KEPT = 40


def cost(rounds: int) -> float:
    """Epsilon after so many rounds, planned for three."""
    release = accounting.plan(read_config(PRIVATE).privacy, KEPT, steps_per_round=3, rounds=3)
    return accounting.epsilon([release] * rounds, 1e-5, "rdp")


def leaks(returned: list[tuple[str, RecordDict]]) -> list[str]:
    """Everything in what the nodes returned that noise does not cover and no config says."""
    found = []
    for kind, content in returned:
        found += [f"{kind} {name}" for record in content.metric_records.values() for name in record]
        found += [f"{kind} {name}" for record in content.config_records.values() for name in record]
        for record in content.array_records.values():
            header = wire.read_header(record)
            found += [f"{kind} weight {header.weight:g}"] if header.weight != 1.0 else []
    return [
        leak for leak in found if leak not in {f"query {name}" for name in ("name", "rank", "code", "base", "where")}
    ]


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


@pytest.mark.slow
def test_a_private_runs_messages_hold_no_figure_and_a_plain_ones_do(settings):
    private = run_in_process(settings(**PRIVATE), nodes=2)
    assert [kind for kind, _ in private.returned] == ["query"] * 2 + ["train"] * 6
    assert leaks(private.returned) == []
    plain = run_in_process(settings(**{"num-server-rounds": 1, "run-name": "plain"}), nodes=2)
    assert {"train loss", "train tokens", "train examples", "train seconds", "evaluate count"} <= set(
        leaks(plain.returned)
    )
    assert any(leak.startswith("train weight") for leak in leaks(plain.returned))


@pytest.mark.parametrize(("mode", "move"), [("update-local", 1), ("update-central", 2)])
def test_noise_on_the_whole_change_is_charged_too(mode, move, settings, tmp_path):
    """Noise that is sized for a node that comes or goes is half of it for a record of a node that stays."""
    flat = settings(**{**PRIVATE, "privacy.mode": mode, "privacy.noise-multiplier": 2.0})
    grid = run_in_process(flat, nodes=2)
    assert leaks(grid.returned) == []
    rows = spent(tmp_path)
    assert {(row.mechanism, row.sample_rate, row.steps, row.noise_multiplier) for row in rows} == {
        (mode, 1.0, 1, 2.0 / move)
    }


def test_a_node_whose_budget_is_spent_refuses_and_the_run_goes_on(settings, tmp_path):
    flat = settings(**PRIVATE, **{"round.min-replies": 1.0, "min-nodes": 1})
    grid = run_in_process(flat, nodes=2, node_config={1: with_budget(tmp_path / "ward", cost(1))})
    (failure,) = events(tmp_path, "failure")
    assert (failure["node"], failure["round"], failure["during"]) == ("node-001", 2, "train")
    assert re.fullmatch(
        r"the privacy budget of this node is spent \(node-001, privacy-epsilon\): expected at most epsilon [\d.]+ at "
        r"delta 1e-05 over all runs, got more with this round. Its operator sees what was spent with .*",
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


def test_the_coordinators_noise_is_trusted_only_where_the_policy_says_so(settings, tmp_path):
    trusting = tmp_path / "trusting.toml"
    trusting.write_text(Path(NAMED).read_text().replace('"update-local"', '"update-central"'))
    nodes = {
        0: with_budget(tmp_path / "ward-0", 20.0, str(trusting)),
        1: with_budget(tmp_path / "ward-1", 20.0),
    }
    flat = settings(**PRIVATE | {"privacy.mode": "update-central", "min-nodes": 1})
    run_in_process(flat, nodes=2, node_config=nodes)
    (failure,) = events(tmp_path, "failure")
    assert failure["node"].startswith("node ")
    assert "expected noise of this node's own (privacy-epsilon), got 'update-central'" in failure["reason"]
    assert [line["nodes"] for line in events(tmp_path, "merge")] == [1, 1, 1]


def test_a_coordinators_delta_does_not_make_a_run_look_cheap(settings, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text(Path(NAMED).read_text() + "max-epsilon = 8.0\n")
    flat = settings(**{**PRIVATE, "privacy.delta": 0.1, "num-server-rounds": 1})
    run_in_process(flat, nodes=2, node_config={1: with_budget(tmp_path / "ward", 100.0, str(file))})
    (failure,) = events(tmp_path, "failure")
    assert "max-epsilon" in failure["reason"]
    assert "at delta 1e-05" in failure["reason"]


def test_a_refused_node_has_not_trained(settings, tmp_path):
    flat = settings(**{**PRIVATE, "rule.name": "fedsa-lora", "num-server-rounds": 1})
    run_in_process(flat, nodes=2, node_config={1: with_budget(tmp_path / "ward", 0.01)})
    assert [file.parents[1].name for file in tmp_path.rglob("personal-*.safetensors")] == ["node-000"]


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
    assert "this run has cost the node what it said it would" in reasons[0]
    assert "stopped after round 2" in capsys.readouterr().out
    assert max(row.epsilon for row in rows) <= 8.0


def test_a_long_text_is_one_example_so_that_a_record_is_what_is_protected(settings, tmp_path):
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({"text": f"def f{n}(self): " + "pass; " * 200}) + "\n" for n in range(20)))
    data = {"data.source": str(source), "data.partition": "none", "num-server-rounds": 1}
    grid = run_in_process(settings(**{**PRIVATE, **data, "min-nodes": 1, "privacy.records": 20}), nodes=1)
    assert leaks(grid.returned) == []
    (row,) = spent(tmp_path, "node-000")
    assert row.sample_rate == 8 / 20


def test_nothing_is_scored_on_a_node_but_the_coordinators_own_data_is(settings, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"def f{i}(self):\n    return self.x\n"}) + "\n" for i in range(4)))
    grid = run_in_process(settings(**PRIVATE, **{"evaluation.source": str(own)}), nodes=2)
    assert "evaluate" not in {kind for kind, _ in grid.returned}
    assert len(events(tmp_path, "central")) == 4
    assert events(tmp_path, "heldout") == []


def test_a_noised_score_is_charged_planned_for_and_the_only_figure(settings, tmp_path, capsys):
    flat = settings(**{**PRIVATE, "privacy.score-noise": 4.0, "num-server-rounds": 2})
    grid = run_in_process(flat, nodes=2)
    assert leaks(grid.returned) == ["train merit", "train count"] * 4 + ["evaluate merit", "evaluate count"] * 2
    rows = spent(tmp_path, "node-000")
    assert [(row.noise_multiplier, row.steps) for row in rows if row.sample_rate == 1.0] == [(4.0, 1)] * 3
    assert 7.9 < rows[-1].epsilon <= 8.0
    assert len(events(tmp_path, "heldout")) == 3
    assert "over 2 nodes, noised" in capsys.readouterr().out


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


def test_what_is_scored_is_never_trained_on_and_noise_as_charged():
    """Of a perfect model: what is read is the number of units, with the noise that was asked for."""

    class Right:
        def score(self, task, unit, batch_size):
            if unit == "broken":
                raise RuntimeError("no score")
            return Score(correct=1, count=1)

    task = tasks.build(TaskConfig(name="classify"))
    found = [noised_score(Right(), task, ["one"] * 50 + ["broken"], 8, 4.0) for _ in range(400)]
    for name in ("merit", "count"):
        drawn = torch.tensor([figures[name] for figures in found])
        assert abs(drawn.mean() - 50) < 5 * 4 * math.sqrt(2 / 400)
        assert drawn.std() == pytest.approx(4 * math.sqrt(2), rel=0.2)


def test_a_nodes_own_model_is_left_in_its_state_directory(settings, tmp_path):
    grid = run_in_process(settings(**{**PRIVATE, "rule.name": "fedsa-lora"}), nodes=2)
    assert leaks(grid.returned) == []
    assert events(tmp_path, "failure") == []
    assert len(list((tmp_path / "state").rglob("adapter_model.safetensors"))) == 2


def test_a_record_that_cannot_be_used_is_no_message_and_no_failure(settings, tmp_path, capsys):
    secret = "HIV positive"
    source = tmp_path / "labels.jsonl"
    records = [{"text": f"note {n}", "label": n % 2 if n else secret} for n in range(40)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records) + "{torn\n")
    task = {"model.name": tiny_bert(tmp_path), "lora.targets": "query,value", "task.name": "classify"}
    data = {"data.source": str(source), "data.partition": "none", "privacy.records": 40, "min-nodes": 1}
    grid = run_in_process(settings(**{**PRIVATE, **task, **data, "num-server-rounds": 1}), nodes=1)
    assert events(tmp_path, "failure") == []
    assert leaks(grid.returned) == []
    assert "39 of 40 records are used" in capsys.readouterr().err


def test_nothing_at_all_to_learn_from_is_no_message_either(settings, tmp_path):
    source = tmp_path / "empty.jsonl"
    source.write_text("")
    data = {"data.source": str(source), "data.partition": "none", "privacy.records": 40, "min-nodes": 1}
    for mode in ("example", "update-local"):
        flat = settings(**{**PRIVATE, **data, "privacy.mode": mode, "num-server-rounds": 1, "run-name": mode})
        grid = run_in_process(flat, nodes=1)
        assert events(tmp_path, "failure", mode) == []
        assert [kind for kind, _ in grid.returned] == ["query", "train"]


def test_a_private_run_needs_the_public_number_of_records(settings, tmp_path):
    with pytest.raises(BouquetError, match="no node can take part"):
        run_in_process(settings(**{**PRIVATE, "privacy.records": 0}), nodes=2)
    reasons = {failure["reason"] for failure in events(tmp_path, "failure")}
    assert all("needs the public number of a node's records" in reason for reason in reasons)
    nodes = {number: {"records": 3000 + number} for number in (0, 1)}
    run_in_process(
        settings(**{**PRIVATE, "privacy.records": 0, "data.limit": 0, "run-name": "own"}), nodes=2, node_config=nodes
    )
    assert {row.sample_rate for row in spent(tmp_path)} == {8 / 3000, 8 / 3001}


def test_a_declared_weight_is_public_and_counts(settings, tmp_path):
    flat = settings(**{"train.weighting": "declared", "num-server-rounds": 1})
    grid = run_in_process(flat, nodes=2, node_config={1: {"weight": 3.0}})
    updates = [content for kind, content in grid.returned if kind == "train"]
    assert [wire.read_header(content["update"]).weight for content in updates] == [1.0, 3.0]
