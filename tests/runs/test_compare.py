"""`bouquet compare`: what is run again and what is not, and the figures of prepared run directories."""

import csv
import json
import re
from pathlib import Path

import pytest

from deploy.command import main
from deploy.compare.cells import Cell, cells
from deploy.compare.profile import Profile, find, read
from deploy.compare.report import write
from deploy.compare.results import read as read_result
from deploy.compare.results import rows
from deploy.compare.runs import Runs
from deploy.compare.table import markdown
from tests.support.comparison import ROUNDS, finish
from tests.support.grid import run_in_process
from tests.support.processes import CORES

SMALL = """
nodes = 2
seeds = [0, 1]
[config]
task = { name = "classify" }
data.source = "/data/train.jsonl"
[partitions]
IID = { data.partition = "iid" }
[rules]
fedit = {}
fed-sb = { lora.rank = 32, train.learning-rate = 0.02 }
"""


@pytest.fixture
def small(tmp_path: Path) -> tuple[Profile, list[Cell], Runs]:
    (tmp_path / "small.toml").write_text(SMALL)
    profile = read(tmp_path / "small.toml", {})
    return profile, cells(profile, {}, quick=False), Runs(tmp_path / "runs", profile.nodes, 1, 0)


def test_the_cells_are_the_tables_crossed_and_the_baselines(small):
    _, everything, _ = small
    assert [(cell.method, cell.seed) for cell in everything] == [
        (method, seed) for seed in (0, 1) for method in ("local", "centralised", "fedit", "fed-sb")
    ]
    local, pooled, fedit, fed_sb = everything[:4]
    assert (local.config["rule.name"], local.config["task.head"]) == ("local", "local")
    assert (pooled.config["data.pooled"], pooled.config["fraction-train"]) == (True, 0.5)
    assert pooled.config["train.steps"] == 2 * fedit.config["train.steps"]
    assert (fed_sb.rank, fed_sb.config["lora.rank"], fed_sb.config["train.learning-rate"]) == (8, 32, 0.02)
    assert len({cell.name for cell in everything}) == len(everything)


def test_the_baselines_are_run_wherever_a_run_is_not_private(tmp_path):
    file = tmp_path / "private.toml"
    file.write_text(
        SMALL
        + "[privacy]\nshort = { train.steps = 2 }\n"
        + 'private = { train.weighting = "uniform", privacy = { mode = "update-central", epsilon = 3.0 } }\n'
    )
    crossed = [(cell.method, cell.privacy) for cell in cells(read(file, {}), {}, quick=False) if cell.seed == 0]
    assert crossed == [
        *((method, "short") for method in ("local", "centralised", "fedit", "fed-sb")),
        *((method, "private") for method in ("fedit", "fed-sb")),
    ]


def test_a_comparison_that_is_private_as_a_whole_has_no_baselines(tmp_path):
    file = tmp_path / "private.toml"
    file.write_text(SMALL)
    over = {"privacy.mode": "update-central", "privacy.epsilon": 3.0, "train.weighting": "uniform"}
    crossed = [cell.method for cell in cells(read(file, over), over, quick=False) if cell.seed == 0]
    assert crossed == ["fedit", "fed-sb"]


def test_the_command_line_is_laid_over_the_profile(small):
    profile, everything, _ = small
    other = cells(profile, {"train.steps": 5, "train.learning-rate": 0.5}, quick=False)
    assert other[2].config["train.steps"] == 5
    assert other[3].config["train.learning-rate"] == 0.02, "a rule's own setting wins"
    assert not {cell.name for cell in other} & {cell.name for cell in everything}


def test_what_is_finished_is_not_run_again(small, tmp_path, capsys):
    _, everything, runs = small
    for cell in everything:
        finish(cell, tmp_path / "runs", {"node-000": 0.8, "node-001": 0.9})
    assert runs.run(everything) == []
    assert capsys.readouterr().out == "8 of 8 runs are finished already\n"


def test_a_run_without_a_summary_or_of_another_config_is_not_finished(small, tmp_path):
    _, everything, runs = small
    one, other = everything[:2]
    for cell in (one, other):
        finish(cell, tmp_path / "runs", {"node-000": 0.8})
    assert runs.is_finished(one)
    assert runs.is_finished(other)
    (tmp_path / "runs" / one.name / "summary.json").unlink()
    config = tmp_path / "runs" / other.name / "config.json"
    config.write_text(config.read_text().replace('"train.batch-size": 8', '"train.batch-size": 9'))
    assert not runs.is_finished(one)
    assert not runs.is_finished(other)
    assert [result.cell for result in runs.results(everything)] == []


def test_the_rows_are_means_over_the_seeds(small, tmp_path):
    _, everything, runs = small
    for cell in everything:
        rise = 0.02 * cell.seed
        finish(cell, tmp_path / "runs", {"node-000": 0.6 + rise, "node-001": 0.8 + rise}, before=0.4, megabytes=0.5)
    table = rows(runs.results(everything), "nodes")
    assert [row.method for row in table] == ["base", "local", "centralised", "fedit", "fed-sb"]
    base, local, _, fedit, fed_sb = table
    assert base.on_nodes == (pytest.approx(0.4), pytest.approx(0.0))
    assert fedit.on_nodes == (pytest.approx(0.71), pytest.approx(0.02 / 2**0.5))
    assert (fedit.fairness, fedit.worst) == (pytest.approx(0.1), pytest.approx(0.61))
    assert fedit.megabytes == 2 * 0.5 * ROUNDS
    assert local.megabytes == 0
    assert list(fedit.history) == list(range(ROUNDS + 1))
    assert (fedit.rank, fed_sb.rank) == (8, 32)
    assert "| fedit | 8 | 0.710 ± 0.014 | 0.700 ± 0.014 | 0.100 | 0.610 | 2.00 | 2.00 | 8 |" in markdown(
        table, "accuracy"
    )


def test_a_resumed_run_counts_every_round_once(small, tmp_path):
    _, everything, _ = small
    run = tmp_path / "runs" / everything[0].name
    finish(everything[0], tmp_path / "runs", {"node-000": 0.8}, megabytes=1)
    again = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"round": 3' in line]
    with (run / "metrics.jsonl").open("a") as record:
        record.write("\n".join(again) + "\n")
    assert read_result(everything[0], run).bytes_up == ROUNDS * 1_000_000


def test_a_line_that_a_kill_has_torn_spoils_no_figure(small, tmp_path):
    _, everything, runs = small
    finish(everything[0], tmp_path / "runs", {"node-000": 0.8})
    (whole,) = runs.results(everything)
    with (tmp_path / "runs" / everything[0].name / "metrics.jsonl").open("a") as record:
        record.write('{"phase": "me')
    assert runs.results(everything) == [whole]


def test_what_a_comparison_leaves(small, tmp_path):
    profile, everything, runs = small
    for cell in everything:
        finish(cell, tmp_path / "runs", {"node-000": 0.8, "node-001": 0.9})
    text = write(tmp_path, "small", profile, runs.results(everything))
    pictures = {"quality-bytes.png", "convergence.png", "fairness.png"}
    left = {path.name for path in tmp_path.iterdir()} - {"runs", "small.toml", "state"}
    assert left == pictures | {"table.csv", "table.md", "rounds.csv", "compare.html"}
    assert (tmp_path / "table.md").read_text() == text
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [line["method"] for line in lines] == ["base", "local", "centralised", "fedit", "fed-sb"]
    assert float(lines[3]["heldout_mean"]) == pytest.approx(0.85)
    html = (tmp_path / "compare.html").read_text()
    assert html.count('src="data:image/png;base64,') == len(pictures)
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", html)
    assert "<td>fedit</td>" in html


def test_private_runs_are_drawn_against_epsilon(small, tmp_path):
    """Run configs name their privacy; here it is set by hand, so that prepared runs have it."""
    profile, everything, runs = small
    private = []
    for cell in everything:
        for epsilon in (1.0, 8.0) if cell.method == "fedit" else ():
            config = dict(cell.config) | {"privacy.mode": "example", "privacy.epsilon": epsilon}
            private.append(Cell(cell.method, cell.partition, cell.rank, f"epsilon {epsilon:g}", cell.seed, config))
    for cell in [*everything, *private]:
        finish(cell, tmp_path / "runs", {"node-000": 0.7, "node-001": 0.75})
    results = runs.results([*everything, *private])
    table = rows(results, "nodes")
    assert [row.epsilon for row in table if row.method == "fedit"] == [None, 1.0, 8.0]
    assert "| fedit | 8 | epsilon 1 | 0.725 ± 0.000 |" in write(tmp_path, "small", profile, results)
    assert (tmp_path / "quality-epsilon.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_lists_the_runs(capsys, tmp_path):
    arguments = ["compare", "stdlib", "train.epochs=3", "--dry-run", "--quick", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split("(")[1].split(",")[0] for line in listed] == ["local", "centralised", "fedit", "fedex-lora"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_comparison_runs_what_is_due_and_goes_on(capsys, tmp_path):
    """One baseline as a real simulation, one that was broken off after its round, and two prepared rules."""
    profile = read(find("stdlib"), {})
    _, pooled, *prepared = cells(profile, {}, quick=True)
    for cell in prepared:
        finish(cell, tmp_path / "runs", {f"node-{number:03d}": 40.0 for number in range(4)}, metric="perplexity")
    named = {"run-name": pooled.name, "run-directory": str(tmp_path / "runs"), "min-nodes": profile.nodes}
    run_in_process(dict(pooled.config) | named, profile.nodes)
    summary = tmp_path / "runs" / pooled.name / "summary.json"
    unbroken = json.loads(summary.read_text())
    summary.unlink()
    arguments = ["compare", "stdlib", "--quick", "--cpus", str(CORES), "--output", str(tmp_path)]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "2 of 4 runs are finished already" in told
    assert "[1/2] local" in told
    assert "[2/2] centralised" in told
    assert "resumed after round 1" in (tmp_path / "runs" / pooled.name / "run.log").read_text()
    assert json.loads(summary.read_text())["adapter_digest"] == unbroken["adapter_digest"]
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [line["method"] for line in table] == ["base", "local", "centralised", "fedit", "fedex-lora"]
    base, alone, together = (float(line["heldout_mean"]) for line in table[:3])
    assert 1 < alone < base
    assert 1 < together < base
    assert main(arguments) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
