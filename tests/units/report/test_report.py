"""The record of a run, read; its report; ``bouquet report`` and ``bouquet runs``."""

import fcntl
import json
import os
import re
import shutil
import time

import pytest

from common import readable
from common.error import BouquetError
from common.privacy.accounting import Release, epsilon, noise_multiplier
from common.record.events import Merge, Train
from common.record.run import Run
from deploy.command import main
from server_app import report
from server_app.record import Record
from server_app.report import chart, page
from server_app.report.spending import epsilon_bounds
from strategies import read_config
from tests.support import recorded
from tests.support.reports import lines, rewrite, text


def test_a_run_ends_with_a_report_of_everything(plain):
    said, run = text(plain), Run.read(plain)
    summary = json.loads((plain / "summary.json").read_text())
    assert run.state == "finished"
    assert "Rounds 3 of 3" in said
    assert f"Perplexity {summary['after']['all']:#.4g} held out; {summary['before']['all']:#.4g} before" in said
    for node in recorded.NODES:
        row = re.search(rf"{node} ([\d.]+) ([\d.]+) ([\d.]+) (\d)", said)
        assert [float(row[1]), float(row[2])] == pytest.approx(
            [summary[when][node] for when in ("before", "after")], 1e-3
        )
        assert row[4] == ("2" if node == "ward-2" else "3")
    for part in ("ward-2 train, round 2", "nodes score and train, updates travel", "the coordinator", "torch 2.13"):
        assert part in said, part
    errors = [event["overall"] for event in lines(plain) if event["phase"] == "aggregation-error"]
    assert all(f"{100 * error:.2g}%" in said for error in errors)
    assert len(errors) == 3


@pytest.mark.parametrize(("rate", "said"), [(0.005, "0.005, the rule's own"), (0.003, "0.003")])
def test_a_learning_rate_is_the_rules_own_or_set_for_this_run(rate, said, copy):
    settings = json.loads((copy / "config.json").read_text())
    settings["config"]["train.learning-rate"] = rate
    (copy / "config.json").write_text(json.dumps(settings))
    report.write(copy)
    assert f"learning rate {said} seed" in text(copy)
    changed = text(copy).split("Set for this run")[1].split("The whole config")[0]
    assert ("train.learning-rate" in changed) == (rate == 0.003)


def test_bytes_stand_beside_the_formula_of_their_rule(plain):
    run = Run.read(plain)
    events = [event for event in lines(plain) if event["phase"] == "train"]
    assert run.trained("up") == sum(event["bytes_up"] for event in events)
    assert run.trained("up") == pytest.approx(run.trained("up", by_formula=True), rel=0.02)
    # B is zero before the first round, and does not travel then.
    later = [run.by_round(Merge)[turn] for turn in (2, 3)]
    assert [merge.bytes_down for merge in later] == pytest.approx([merge.formula_down for merge in later], rel=0.02)
    assert f"up, training {readable.size(run.trained('up'))}" in text(plain)


def test_what_a_node_wrote_is_text_and_nothing_else(plain):
    html = (plain / "report.html").read_text()
    assert "<script" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;document.title" in html
    assert "RuntimeError: &lt;b&gt;\N{REPLACEMENT CHARACTER}[31mno&lt;/b&gt;" in html
    assert not re.search(r"""(src|href)=|url\(|@import""", html)


def test_each_class_has_a_line_and_the_exported_round_its_figures(copy):
    events = lines(copy)
    for event in events:
        if event["phase"] == "heldout":
            event["classes"] = {"ham": {"share": 0.75, "recall": 0.5 + event["round"] / 10}, "rare": {"share": 0.0}}
    rewrite(copy, events)
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"rounds": 2}))
    report.write(copy)
    said = text(copy)
    assert "on the held-out examples of all nodes, after round 2." in said.lower()
    assert "ham 75.0% 50.0% 70.0% rare 0.0%" in said
    assert "held out, after round 2, the best;" in said


def test_figures_that_nobody_asked_for_do_not_take_the_place_of_facts(plain):
    odd = [event for event in lines(plain) if event.get("node") == "ward-3" and event["phase"] == "train"]
    assert [event["round"] for event in odd] == [1, 2, 3]
    assert all("<script>" not in event for event in odd)


def test_a_private_run_is_reported_without_a_figure_of_its_nodes(private):
    said, run = text(private), Run.read(private)
    noise = noise_multiplier(8.0, 1e-5, 1.0, 3, "rdp")
    spent = epsilon([Release(noise, 1.0, 1)] * 3, 1e-5, "rdp")
    assert epsilon_bounds(run) == {"ward-1": spent, "ward-2": spent}
    assert f"Epsilon of a node ≤ {spent:.3g} at delta 1e-05" in said
    sent = sum(event.bytes_up for event in run.by_node(Train)["ward-1"].values())
    assert f"ward-1 3 {readable.size(sent)}" in said
    for absent in ("Training loss", "tokens", "held out", "a node, at most"):
        assert absent not in said, absent
    assert "every node keeps a model of its own" in said


@pytest.mark.parametrize(
    ("changes", "asked", "bound"),
    [
        ({}, 3, 8.0),
        ({}, 2, 8.0),
        ({}, 4, None),  # a round that was tried again comes on top of what was planned
        ({"privacy.noise-multiplier": 1.0}, 3, None),
        ({"privacy.mode": "none"}, 3, None),
    ],
)
def test_epsilon_under_dp_sgd_is_what_was_planned_or_the_ledgers_to_tell(changes, asked, bound, tmp_path):
    config = {"privacy.mode": "example", "train.weighting": "uniform", "num-server-rounds": 3} | changes
    config = read_config(config).to_flower()
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    rewrite(tmp_path, [{"phase": "asked", "round": turn + 1, "nodes": ["ward-1"]} for turn in range(asked)])
    assert epsilon_bounds(Run.read(tmp_path)) == ({} if config["privacy.mode"] == "none" else {"ward-1": bound})


def test_a_run_under_way_is_known_by_its_lock_and_has_one_writer(settings, tmp_path):
    config = read_config(settings(resume=True))
    with Record(config, 1):
        assert Run.read(tmp_path / "run").state == "running"
        with pytest.raises(BouquetError, match=r"this run is under way .*choose another run-name"):
            Record(config, 2)
    assert Run.read(tmp_path / "run").state == "broken off"


def test_a_folder_that_is_no_run_is_told(tmp_path, copy, capsys):
    for folder, said in (
        (
            tmp_path / "none",
            "there is no run here ({}): expected a run directory, which has config.json and metrics.jsonl",
        ),
        (tmp_path, f"got a folder of 1 runs. Name one of them, such as {copy}."),
    ):
        assert main(["report", str(folder)]) == 2
        assert said.format(folder) in capsys.readouterr().err


def test_runs_are_listed(plain, private, tmp_path, capsys):
    for run in (plain, private):
        shutil.copytree(run, tmp_path / "runs" / run.name)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    rows = {
        cells[1]: cells for line in capsys.readouterr().out.splitlines() if len(cells := re.split(r"\s*│\s*", line)) > 3
    }
    score = json.loads((plain / "summary.json").read_text())["after"]["all"]
    assert rows["plain"][2:5] == ["fedit", "3/3", f"perplexity {score:#.4g}"]
    assert rows["private"][2:5] == ["fedsa-lora", "3/3", "-"]
    assert (rows["plain"][7:9], rows["private"][7:9]) == (["-", "finished"], ["≤ 8", "finished"])
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "bouquet run starts one" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder of runs" in capsys.readouterr().err


def test_old_runs_are_deleted_and_all_else_stays(plain, tmp_path, capsys):
    runs = tmp_path / "runs"
    for name in ("old", "young", "going"):
        shutil.copytree(plain, runs / name)
    (runs / "notes").mkdir()
    (runs / "link").symlink_to(runs / "young")
    for name, days in (("old", 91), ("young", 89), ("going", 91)):
        then = time.time() - 86_400 * days
        os.utime(runs / name / "metrics.jsonl", (then, then))
    with (runs / "going/metrics.jsonl").open("a") as going:
        fcntl.flock(going, fcntl.LOCK_EX)
        assert main(["runs", str(runs), "--prune", "90"]) == 0
    assert capsys.readouterr().out == f"deleted {runs}/old\n"
    assert {run.name for run in runs.iterdir()} == {"young", "going", "notes", "link"}
    for days in ("-1", "nan"):
        assert main(["runs", str(runs), "--prune", days]) == 2
        assert "an impossible age (--prune): expected 0 days or more" in capsys.readouterr().err
    assert main(["runs", str(runs), "--prune", "0"]) == 0
    assert {run.name for run in runs.iterdir()} == {"notes", "link"}


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0.2, 0.9, [0.2, 0.4, 0.6, 0.8, 1.0]), (27, 92, [20, 40, 60, 80, 100]), (3, 3, [3, 4]), (0, 0, [0, 0.25])],
)
def test_marks_are_round_and_cover_the_figures(low, high, marks):
    found = chart.ticks(low, high)
    assert found[: len(marks)] == pytest.approx(marks)
    assert found[0] <= low <= high <= found[-1]


def test_text_becomes_html_only_escaped():
    assert (
        page.element("td", "a < b", page.element("b", "&"), title='"') == '<td title="&quot;">a &lt; b<b>&amp;</b></td>'
    )


def test_the_report_appears_whole(copy, monkeypatch):
    """A reader who has it open while it is made again never meets half of it."""
    before = (copy / "report.html").stat().st_ino
    report.write(copy)
    assert (copy / "report.html").stat().st_ino != before
    assert not list(copy.glob("*.building"))
