"""Private runs in one process: what leaves the nodes, what is noised, and what a record is."""

import json
import math
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from client_app.scoring import noised_score
from common import tasks, wire
from common.config.run import TaskConfig
from common.error import BouquetError
from common.tasks import Score
from tests.support.architectures import tiny_bert
from tests.support.grid import NAMED, run_in_process, with_budget
from tests.support.outcome import events
from tests.support.private_runs import PRIVATE, spent


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
    assert "expected noise added by this node (privacy-epsilon), got 'update-central'" in failure["reason"]
    assert [line["nodes"] for line in events(tmp_path, "merge")] == [1, 1, 1]


def test_a_refused_node_has_not_trained(settings, tmp_path):
    flat = settings(**{**PRIVATE, "rule.name": "fedsa-lora", "num-server-rounds": 1})
    run_in_process(flat, nodes=2, node_config={1: with_budget(tmp_path / "ward", 0.01)})
    assert [file.parents[1].name for file in tmp_path.rglob("personal-*.safetensors")] == ["node-000"]


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
