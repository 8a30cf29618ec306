"""Records that are torn, old, broken off or run again: reported all the same."""

import json
from pathlib import Path

import pytest

from common.error import BouquetError
from common.record.events import Merge, Train
from common.record.run import Run
from deploy.command import main
from server_app.record import Record
from strategies import read_config
from tests.support.reports import lines, rewrite, text


def test_of_a_round_that_was_run_again_the_last_time_counts(copy):
    """Killed in round 2 after a reply had come, gone on with; the second attempt has another node."""
    whole = Run.read(copy)
    events = [event for event in lines(copy) if event["round"] < 3]
    first = next(index for index, event in enumerate(events) if event["phase"] == "asked" and event["round"] == 2)
    attempt = [{**event, "bytes_up": 10**9, "node": "ward-9"} for event in events[first:] if event["phase"] == "train"]
    again = [{"phase": "opened", "round": 0, "elapsed": 0.0}, {"phase": "start", "round": 1, "elapsed": 0.0}]
    rewrite(copy, events[: first + 1] + attempt + again + events[first:])
    run = Run.read(copy)
    assert run.done == 2
    assert run.trained("up") == sum(whole.by_round(Merge)[turn].bytes_up for turn in (1, 2))
    assert "ward-9" not in run.by_node(Train)
    before = events[first]["elapsed"]
    assert run.seconds == pytest.approx(attempt[-1]["elapsed"] + events[-1]["elapsed"])
    assert before < run.seconds


def test_a_later_start_makes_the_rounds_after_it_void(copy):
    """A checkpoint was damaged: the run went on from the one before it."""
    rewrite(copy, [*lines(copy), {"phase": "opened", "round": 0, "elapsed": 0.0}, {"phase": "start", "round": 1}])
    assert Run.read(copy).done == 1


def test_a_run_that_is_broken_off_says_why(settings, tmp_path):
    with pytest.raises(BouquetError, match="too few nodes"), Record(read_config(settings()), 1):
        raise BouquetError("too few nodes", expected="4", got="<1>")
    run = Run.read(tmp_path / "run")
    assert (run.state, run.stopped.reason, run.done) == ("broken off", "too few nodes: expected 4, got <1>", 0)
    assert "broken off" in text(tmp_path / "run")
    assert "too few nodes: expected 4, got <1>" in text(tmp_path / "run")


def spoil_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")


def spoil_last_line(folder: Path) -> None:
    record = folder / "metrics.jsonl"
    record.write_text(record.read_text() + '{"phase": "me')


def spoil_summary(folder: Path) -> None:
    (folder / "summary.json").write_text('{"rou')


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def spoil_keys(folder: Path) -> None:
    """As the first version wrote them."""
    new = {"opened", "asked", "start", "evaluation"}
    kept = {
        "phase",
        "round",
        "elapsed",
        "node",
        "nodes",
        "asked",
        "loss",
        "perplexity",
        "bytes_up",
        "bytes_down",
        "reason",
    }
    events = [{key: event[key] for key in event if key in kept} for event in lines(folder) if event["phase"] not in new]
    rewrite(folder, events)
    (folder / "config.json").write_text(json.dumps({"config": {"rule.name": "fedit", "num-server-rounds": 3}}))


def spoil_values(folder: Path) -> None:
    """Every value is something else than it should be."""
    odd = ["<i>", None, [], {}, -1, 1e400]
    events = [
        {
            key: value if key in {"phase", "round"} else odd[(index + place) % 6]
            for place, (key, value) in enumerate(event.items())
        }
        for index, event in enumerate(lines(folder))
    ]
    rewrite(folder, events)


@pytest.mark.parametrize(
    ("spoil", "state", "shown"),
    [
        (spoil_metrics, "finished", "No node has been asked yet."),
        (spoil_last_line, "finished", "unreadable lines 1 of metrics.jsonl"),
        (spoil_summary, "broken off", "Rounds 3 of 3"),
        (spoil_config, "finished", "unknown rule"),
        (spoil_keys, "finished", "Rounds 3 of 3"),
        (spoil_values, "finished", "Rounds 3 of 3"),
    ],
)
def test_a_directory_that_is_torn_or_old_is_reported_all_the_same(spoil, state, shown, copy, capsys):
    spoil(copy)
    assert main(["report", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy / 'report.html'}\n"
    said = text(copy)
    assert f"plain {state}" in said
    assert shown in said
    assert "<i>" not in (copy / "report.html").read_text()
    assert main(["runs", str(copy.parent)]) == 0
    assert main(["watch", "--once", str(copy)]) == 0
