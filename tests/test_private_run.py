"""Private runs in one process: what they cost, what leaves the nodes, and who refuses what."""

import json
import re

import pytest
from flwr.app import RecordDict

from common import accounting, ledger, wire
from common.error import BouquetError
from strategies import read_config
from tests.conftest import tiny_bert
from tests.grid import run_in_process

PRIVATE = {
    "privacy.mode": "example",
    "privacy.accountant": "rdp",
    "privacy.expected-batch": 8,
    "train.weighting": "uniform",
    "rule.name": "ffa-lora",
    "num-server-rounds": 3,
}
TRAINED_ON = 36  # of 40 (data.limit), a tenth is held out


def events(tmp_path, phase, run="run"):
    lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def cost(rounds: int) -> float:
    """Epsilon after so many rounds, planned for three."""
    release = accounting.plan(read_config(PRIVATE).privacy, TRAINED_ON, steps_per_round=3, rounds=3)
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
    return [leak for leak in found if leak not in {f"query {name}" for name in ("name", "rank", "code", "where")}]


def test_the_run_costs_what_was_planned(settings, tmp_path):
    flat = settings(**PRIVATE)
    run_in_process(flat, nodes=2)
    config = read_config(flat)
    release = accounting.plan(config.privacy, TRAINED_ON, config.train.steps, config.num_server_rounds)
    rows = ledger.read(tmp_path / "state")
    for dataset in {row.dataset for row in rows}:
        own = [row for row in rows if row.dataset == dataset]
        assert [row.release for row in own] == [release] * 3
        assert [(row.run, row.round, row.rule, row.mechanism) for row in own] == [
            ("run", turn, "ffa-lora", "example") for turn in range(3)
        ]
        assert [row.epsilon for row in own] == [accounting.epsilon([release] * n, 1e-5, "rdp") for n in (1, 2, 3)]
        assert config.privacy.epsilon - 0.01 <= own[-1].epsilon <= config.privacy.epsilon
    assert len(rows) == 6


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


@pytest.mark.parametrize("mode", ["update-local", "update-central"])
def test_noise_on_the_whole_change_is_charged_too(mode, settings, tmp_path):
    grid = run_in_process(settings(**{**PRIVATE, "privacy.mode": mode}), nodes=2)
    assert leaks(grid.returned) == []
    rows = ledger.read(tmp_path / "state")
    assert {(row.mechanism, row.sample_rate, row.steps) for row in rows} == {(mode, 1.0, 1)}
    assert 7.9 < rows[-1].epsilon <= 8.0


def test_a_node_whose_budget_is_spent_refuses_and_the_run_goes_on_without_it(settings, tmp_path):
    flat = settings(**PRIVATE, **{"round.min-replies": 1.0})
    grid = run_in_process(flat, nodes=2, node_config={1: {"privacy-epsilon": cost(1)}})
    (failure,) = events(tmp_path, "failure")
    assert (failure["node"], failure["round"], failure["during"]) == ("node-001", 2, "train")
    assert re.fullmatch(
        r"the privacy budget of this node is spent \(node-001, privacy-epsilon\): expected at most epsilon [\d.]+ at "
        r"delta 1e-05 over all runs on its data, got more with this round. Its operator sees what was spent with .*",
        failure["reason"],
    )
    assert [line["nodes"] for line in events(tmp_path, "merge")] == [2, 1, 1]
    asked = [message.metadata.dst_node_id for message in grid.sent if message.metadata.message_type == "train"]
    assert asked == [1000, 1001, 1000, 1001, 1000]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_budgets_hold_over_runs_and_a_run_that_nobody_can_go_on_with_ends(settings, tmp_path, capsys):
    budget = {"privacy-epsilon": cost(4)}

    def go(name):
        flat = settings(**PRIVATE, **{"run-name": name})
        run_in_process(flat, nodes=2, node_config={0: budget, 1: budget})
        return [line["nodes"] for line in events(tmp_path, "merge", name)]

    assert go("one") == [2, 2, 2]
    assert go("two") == [2]
    assert "no node takes part any more: stopped, round 1 is the last" in capsys.readouterr().out
    assert (tmp_path / "two/adapter/adapter_model.safetensors").exists()
    with pytest.raises(BouquetError, match="no node can take part"):
        go("three")
    assert max(row.epsilon for row in ledger.read(tmp_path / "state")) == cost(4)


def test_a_node_with_a_budget_takes_no_part_in_a_run_without_noise(settings, tmp_path):
    flat = settings(**{"num-server-rounds": 1})
    run_in_process(flat, nodes=2, node_config={1: {"privacy-epsilon": 8.0}})
    (failure,) = events(tmp_path, "failure")
    assert failure["reason"] == (
        "this node's policy does not allow it:\n  privacy.mode: expected a private run (privacy-epsilon), got 'none'"
    )


def test_a_node_with_a_budget_trusts_a_coordinators_noise_only_where_its_policy_says_so(settings, tmp_path):
    trusting = tmp_path / "trusting.toml"
    trusting.write_text('[privacy]\nmodes = ["update-central"]\n')
    nodes = {0: {"privacy-epsilon": 8.0, "policy": str(trusting)}, 1: {"privacy-epsilon": 8.0}}
    run_in_process(settings(**{**PRIVATE, "privacy.mode": "update-central"}), nodes=2, node_config=nodes)
    (failure,) = events(tmp_path, "failure")
    assert failure["node"].startswith("node ")
    assert "expected noise of this node's own (privacy-epsilon), got 'update-central'" in failure["reason"]
    assert [line["nodes"] for line in events(tmp_path, "merge")] == [1, 1, 1]


def test_a_coordinators_delta_does_not_make_a_run_look_cheap(settings, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text("[privacy]\nmax-epsilon = 8.0\n")
    flat = settings(**{**PRIVATE, "privacy.delta": 0.9, "num-server-rounds": 1})
    run_in_process(flat, nodes=2, node_config={1: {"policy": str(file)}})
    (failure,) = events(tmp_path, "failure")
    assert "the run's epsilon at delta 1e-05: expected at most 8, got more" in failure["reason"]


def test_a_refused_node_has_not_trained(settings, tmp_path):
    flat = settings(**{**PRIVATE, "rule.name": "fedsa-lora", "num-server-rounds": 1})
    run_in_process(flat, nodes=2, node_config={1: {"privacy-epsilon": 0.01}})
    assert [file.parent.name for file in (tmp_path / "state").rglob("personal-*.safetensors")] == ["node-000"]


@pytest.mark.slow
def test_a_round_that_is_tried_again_is_charged_again_and_the_run_keeps_to_what_it_declared(settings, tmp_path, capsys):
    replies = []

    def loses_the_first(content: RecordDict) -> RecordDict | None:
        replies.append(content)
        return content if len(replies) > 1 else None

    flat = settings(**PRIVATE, **{"round.min-replies": 1.0, "round.deadline": 3.0})
    run_in_process(flat, nodes=2, tamper={1: loses_the_first})
    rows = ledger.read(tmp_path / "state")
    assert [row.round for row in rows] == [0, 0, 0, 0, 1, 1]
    reasons = [failure["reason"] for failure in events(tmp_path, "failure") if failure["round"] == 3]
    assert len(reasons) == 2
    assert "this run has cost the node what it said it would" in reasons[0]
    assert "stopped, round 2 is the last" in capsys.readouterr().out
    assert max(row.epsilon for row in rows) <= 8.0


def test_a_long_text_is_one_example_so_that_a_record_is_what_is_protected(settings, tmp_path):
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({"text": f"def f{n}(self): " + "pass; " * 200}) + "\n" for n in range(20)))
    data = {"data.source": str(source), "data.partition": "none", "num-server-rounds": 1}
    grid = run_in_process(settings(**{**PRIVATE, **data, "min-nodes": 1}), nodes=1)
    assert leaks(grid.returned) == []
    (row,) = ledger.read(tmp_path / "state")
    assert row.sample_rate == 8 / 18


def test_nothing_is_scored_on_a_node_but_the_coordinators_own_data_is(settings, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"def f{i}(self):\n    return self.x\n"}) + "\n" for i in range(4)))
    grid = run_in_process(settings(**PRIVATE, **{"evaluation.source": str(own)}), nodes=2)
    assert "evaluate" not in {kind for kind, _ in grid.returned}
    assert len(events(tmp_path, "central")) == 4
    assert events(tmp_path, "heldout") == []


def test_a_node_with_a_model_of_its_own_still_leaves_it_in_its_state_directory(settings, tmp_path):
    grid = run_in_process(settings(**{**PRIVATE, "rule.name": "fedsa-lora"}), nodes=2)
    assert leaks(grid.returned) == []
    assert events(tmp_path, "failure") == []
    assert len(list((tmp_path / "state").rglob("adapter_model.safetensors"))) == 2


def test_an_error_does_not_tell_the_data(settings, tmp_path, capsys):
    secret = "HIV positive"
    source = tmp_path / "labels.jsonl"
    records = [{"text": f"note {n}", "label": n % 2 if n else secret} for n in range(40)]
    source.write_text("".join(json.dumps({**record, "label": str(record["label"])}) + "\n" for record in records))
    task = {"model.name": tiny_bert(tmp_path), "lora.targets": "query,value", "task.name": "classify"}
    flat = settings(**PRIVATE, **task, **{"data.source": str(source), "data.partition": "iid"})
    with pytest.raises(BouquetError, match="no node can take part"):
        run_in_process(flat, nodes=2)
    reasons = [failure["reason"] for failure in events(tmp_path, "failure")]
    assert (
        reasons
        == [
            "an error that a private run does not tell, since its text may hold some of the data; the node's log has it"
        ]
        * 2
    )
    assert "a label is out of range" in capsys.readouterr().err


def test_a_declared_weight_is_public_and_counts(settings, tmp_path):
    flat = settings(**{"train.weighting": "declared", "num-server-rounds": 1})
    grid = run_in_process(flat, nodes=2, node_config={1: {"weight": 3.0}})
    updates = [content for kind, content in grid.returned if kind == "train"]
    assert [wire.read_header(content["update"]).weight for content in updates] == [1.0, 3.0]
