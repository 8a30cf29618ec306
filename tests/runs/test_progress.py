"""A run that ends where it began says so."""

import json
from dataclasses import replace

import pytest

from common import tasks
from common.adapter.values import Key, State
from server_app.progress import stalled
from server_app.rounds import Outcome
from server_app.scoring import Evaluation
from strategies import Recipe, Rule, read_config
from strategies.rules import FLASC, FedIT, FedSALora, FedSB, FLora
from tests.support.factors import WIDE, after_a_round, initial, spec, started
from tests.support.grid import run_in_process

CONFIG = read_config({})
TEXT = tasks.build(CONFIG.task)
CLASSES = tasks.build(read_config({"task.name": "classify"}).task)


def said_of(rule: Rule, state: State, before: float = 96.0, after: float = 30.0, task: tasks.Task = TEXT) -> str:
    scores = [Evaluation(figure, 0.0, {}, "") for figure in (before, after)]
    return stalled(Outcome(state, *scores), Recipe.around(rule, CONFIG), task)


def test_a_run_that_hardly_moved_says_so_and_what_to_raise(settings, tmp_path, capsys):
    changes = {"num-server-rounds": 1, "train.steps": 1, "train.learning-rate": 1e-6}
    run_in_process(settings(**changes), nodes=2)
    shown = capsys.readouterr().out
    assert "the run ended where it began, held-out perplexity" in shown
    assert "raise train.learning-rate (1e-06 in this run), train.steps or num-server-rounds" in shown
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["phase"] == "stalled"] == [1]
    assert "the run ended where it began" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("rule", [FedIT(), FedSB(), FLora(), FLASC()], ids=lambda rule: rule.name)
def test_a_view_that_adds_nothing_is_told_whatever_the_figures(rule):
    blank, moved = initial(rule, spec(rule), seed=0), after_a_round(rule, WIDE, 8, nodes=2)
    assert said_of(rule, replace(blank, round=5)).startswith(
        "the adapter adds nothing to the base model after 5 rounds"
    )
    assert not said_of(rule, moved)


def test_it_is_the_view_that_counts_and_not_what_the_server_keeps_back():
    """FLASC's one threshold over both factors never let B down."""
    state = started(FedIT())
    kept_back = replace(state, adapter={k: t * (0 if k.part == "B" else 1) for k, t in state.adapter.items()})
    other_slot = replace(kept_back, adapter=kept_back.adapter | {Key("wide", "B"): state.adapter[Key("wide", "B")]})
    assert said_of(FedIT(), kept_back)
    assert not said_of(FedIT(), other_slot)
    assert not said_of(FedSALora(), kept_back), "there is no global model to look at"


@pytest.mark.parametrize(
    ("task", "before", "after", "told"),
    [
        (TEXT, 96.08, 96.08, "where it began"),
        (TEXT, 96.08, 95.0, "where it began"),
        (TEXT, 96.08, 120.0, "worse than it began"),
        (TEXT, 96.08, 90.0, ""),
        (CLASSES, 0.26, 0.26, "where it began"),
        (CLASSES, 0.26, 0.25, "where it began"),
        (CLASSES, 0.66, 0.4, "worse than it began"),
        (CLASSES, 0.26, 0.3, ""),
        (CLASSES, 1.0, 0.99, ""),
    ],
)
def test_what_is_no_progress_depends_on_which_way_the_figure_goes(task, before, after, told):
    said = said_of(FedIT(), started(FedIT()), before, after, task)
    assert said.startswith(f"the run ended {told}") if told else not said
    assert ("lower train.learning-rate" in said) == ("worse" in told)


def test_a_run_that_was_scored_once_or_never_has_no_progress_to_tell():
    state, score = started(FedIT()), Evaluation(96.0, 4.0, {}, "")
    for outcome in (Outcome(state), Outcome(state, score, score), Outcome(state, None, score)):
        assert not stalled(outcome, Recipe.around(FedIT(), CONFIG), TEXT)
