"""A figure has one home: terminal, summary, record and report agree on a run; doctor, plan and record on a rule."""

import json
import re
import subprocess
import sys
from html import unescape
from io import StringIO

import pytest
from flwr.app import ConfigRecord, RecordDict
from rich.console import Console

from common import readable
from common.models import adapted
from common.record.events import Train, to_line
from common.record.run import Run, read_events
from deploy import plan, runs
from deploy.doctor import job
from strategies import RULES, Recipe, read_config
from strategies.cost import planned_bytes, round_bytes
from tests.support.factors import trained
from tests.support.grid import run_in_process

FAILURE = RecordDict({"failure": ConfigRecord({"reason": "out of memory"})})


def said_in_report(folder):
    html = (folder / "report.html").read_text()
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html.split("<body>")[1])).split())


def eventful(settings, folder):
    """Of four nodes one fails once, so that the first round is tried twice, and one is late twice, and sits out."""
    answers = iter((FAILURE,))
    changes = {
        "num-server-rounds": 2,
        "train.steps": 1,
        "round.deadline": 0.3,
        "round.max-failures": 2,
        "round.sit-out": 1,
        "round.min-replies": 0.75,
        "evaluation.every": 2,
    }

    def fail(content):
        return next(answers, content)

    run_in_process(settings(**changes), nodes=4, tamper={1: fail}, late={3: 0.7})
    return folder / "run"


def test_terminal_summary_record_and_report_agree(settings, tmp_path, capsys):
    folder = eventful(settings, tmp_path)
    terminal = capsys.readouterr().out
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = {event["phase"] for event in events}
    assert {"failure", "late", "sit-out", "void", "evaluation"} <= phases
    summary, report = json.loads((folder / "summary.json").read_text()), said_in_report(folder)
    own = {way: sum(e.get(f"bytes_{way}", 0) for e in events if "node" not in e) for way in ("up", "down")}
    assert own["down"] > Run.read(folder).trained("down") > 0
    assert own == {way: summary[f"bytes_{way}"] for way in own}
    up, down = (readable.size(own[way]) for way in ("up", "down"))
    assert f"bytes transferred: {up} up, {down} down" in terminal
    assert f"Bytes up {up}" in report
    assert f"Bytes down {down}" in report
    failures = [event["node"] for event in events if event["phase"] == "failure"]
    assert summary["failures"] == {name: failures.count(name) for name in sorted(set(failures))}
    assert f"Failures {len(failures)} the reasons are below" in report
    assert sum(summary["late"].values()) == sum(event["phase"] == "late" for event in events) > 0
    console = Console(width=160, record=True, file=StringIO())
    console.print(runs.table([Run.read(folder)]))
    assert re.search(rf"{up} *│ *{down}", console.export_text())


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["fedit", "fed-sb", "flasc", "ffa-lora", "fedsa-lora", "rolora", "ravan", "flora"])
def test_doctor_plan_and_record_say_the_same_of_a_rules_bytes(name, codec):
    config = read_config({"rule.name": name, "wire.up": codec, "num-server-rounds": 3, "min-nodes": 3})
    recipe = Recipe.build(config)
    spec = adapted.describe(config.model, config.lora, config.task, recipe.structure)
    planned = planned_bytes(recipe, spec, nodes=3)
    said = plan.rule_plan(recipe, spec)
    assert (said.up, said.down) == planned
    assert job.traffic(config).startswith(f"at most {readable.size(planned.up)} up, {readable.size(planned.down)} down")
    # What a run records, for all of its nodes, in the round that costs most.
    state, names, most = recipe.start(spec, 0), ("a", "b", "c"), [0.0, 0.0]
    for _ in range(config.num_server_rounds):
        cost = round_bytes(recipe, state, dict.fromkeys(names, spec.rank), names)
        most = list(map(max, most, cost))
        state = recipe.aggregate(state, [trained(recipe.rule, state, seed, 1.0) for seed in range(len(names))])
    assert [figure / 3 for figure in most] == pytest.approx(list(planned))


def test_every_rule_is_planned_for():
    for name in RULES:
        config = read_config({"rule.name": name})
        assert re.match(r"at most [\d.]+ \w+ up, [\d.]+ \w+ down per node and round", job.traffic(config)), name


def test_runs_and_reports_are_read_without_torch(settings, tmp_path):
    from server_app.record import Record

    with Record(read_config(settings()), run_id=1):
        pass
    code = f"""
import sys
from deploy.command import main
assert main(["runs", {str(tmp_path)!r}]) == main(["report", {str(tmp_path / "run")!r}]) == 0
assert not {{"torch", "flwr", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_many_events_are_read_once_and_a_torn_line_spoils_no_other(tmp_path):
    written = [Train(round=turn, node="a", bytes_up=turn, bytes_down=0) for turn in range(2500)]
    lines = [to_line(event) for event in written]
    lines[1200] = lines[1200][:9]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    events, torn = read_events(tmp_path)
    assert (torn, list(events)) == (1, written[:1200] + written[1201:])
