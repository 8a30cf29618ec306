"""A line of the record: strict where it is written, read back as it was, and read with tolerance whoever wrote it."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest

from common.json_files import read_lines
from common.record.event import Event
from common.record.events import PHASES, Data, Evaluate, HeldOut, Merge, RuleFacts, from_line, to_line
from common.sources.counts import Counts

SAMPLES = {
    int: 7,
    float: 0.5,
    float | None: 2.5,
    str: "ward-1",
    tuple[str, ...]: ("ward-1", "ward-2"),
    RuleFacts: RuleFacts(paper="arXiv", exact=True, personal=False, learning_rate=0.1),
    Counts: Counts(records=5, left_out={"text": 2}, cut=1, examples=3, length=32),
    Mapping[str, float]: {"layer": 0.25},
    Mapping[str, float] | None: {"macro-f1": 0.5},
    Mapping[str, Mapping[str, float]] | None: {"ham": {"share": 1.0}},
}


def sample(kind: type[Event]) -> Event:
    hints = get_type_hints(kind)
    return kind(**{field.name: SAMPLES[hints[field.name]] for field in fields(kind)})


@pytest.mark.parametrize("kind", PHASES.values())
class TestEveryPhase:
    def test_is_read_as_it_was_written(self, kind):
        event = sample(kind)
        assert from_line(json.loads(to_line(event))) == event

    def test_is_read_without_what_an_older_release_did_not_write_and_with_what_a_newer_one_does(self, kind):
        event = from_line({"phase": kind.phase, "round": 3, "elapsed": 1.5, "metric": "", "of_a_newer_release": [1]})
        assert type(event) is kind
        assert (event.round, event.elapsed) == (3, 1.5)
        assert not any(event.figures.get(name) for name in ("seconds", "loss", "score", "of_a_newer_release"))

    @pytest.mark.parametrize("odd", [None, "<i>", [], {}, True, float("inf"), -1])
    def test_is_read_whatever_its_values_are(self, kind, odd):
        line = {field.name: odd for field in fields(kind)} | {"phase": kind.phase, "round": 1}
        assert type(from_line(line)) is kind

    def test_is_written_with_all_its_facts_or_not_at_all(self, kind):
        needed = [field for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
        facts = {field.name: getattr(sample(kind), field.name) for field in needed}
        for name in facts:
            with pytest.raises(TypeError, match=name):
                kind(**{key: value for key, value in facts.items() if key != name})


def test_a_phase_of_a_newer_release_has_its_time_and_no_more():
    event = from_line({"phase": "voted", "round": 2, "elapsed": 3.0, "votes": 4})
    assert event == Event(round=2, elapsed=3.0)
    assert (event.figures, event.crossed) == ({}, {})


@pytest.mark.parametrize("line", [{}, {"phase": "merge"}, {"phase": 1, "round": 1}, {"phase": "merge", "round": "1"}])
def test_what_has_no_phase_and_round_is_no_event(line):
    assert from_line(line) is None


def test_a_score_that_stands_under_its_metrics_name_is_found():
    """As release 0.1.0 wrote it; a second figure came after the first."""
    said = {"phase": "evaluate", "round": 1, "node": "a", "accuracy": 0.5, "macro-f1": 0.25, "loss": 2.0, "count": 8}
    assert from_line(said) == Evaluate(
        round=1, node="a", metric="accuracy", score=0.5, further={"macro-f1": 0.25}, loss=2.0, count=8
    )
    unscored = from_line({"phase": "heldout", "round": 1, "loss": 2.0})
    assert unscored == HeldOut(round=1, metric="", score=None, loss=2.0)


def test_charts_call_a_score_by_its_metric_and_never_by_a_field():
    event = HeldOut(round=4, elapsed=9.0, metric="accuracy", score=0.5, further={"macro-f1": 0.25}, loss=2.0)
    assert event.figures == {"accuracy": 0.5, "macro-f1": 0.25, "loss": 2.0}
    assert Data(round=0, node="a", counts=SAMPLES[Counts]).figures == SAMPLES[Counts].numbers()


def test_what_is_not_known_is_not_written():
    written = json.loads(to_line(sample(Merge)))
    assert "loss" in written
    assert "loss" not in json.loads(to_line(from_line({key: written[key] for key in written if key != "loss"})))


def test_lines_are_read_around_those_that_are_torn(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert list(read_lines(file)) == []
    file.write_bytes(b'{"a": 1}\n{"a": 2\n[3]\n\n{"a": "\xff"}\n{"a": 5}')
    assert list(read_lines(file)) == [{"a": 1}, None, None, None, {"a": "\N{REPLACEMENT CHARACTER}"}, {"a": 5}]
