"""Kind 11: how many records a node has shows nowhere: not in sizes, noise, rates, nor in when it stops."""

import pytest
import torch

from tests.attacks.hostile import (
    CLASSIFY,
    LOCAL,
    MANY_VALUES,
    RECORDS,
    Node,
    failure,
    heard,
    neighbours,
    refused,
    task,
    update,
)
from tests.attacks.taps import sums
from tests.support.cells import each

MANY = [{**record, "text": f"{record['text']}# {turn}\n"} for turn in range(8) for record in RECORDS]
PLANNED = {"privacy.noise-multiplier": 0.0, "privacy.expected-batch": 4}
SIZES = {"one more": (8, 9), "twice as many": (8, 16), "eight times": (8, 64), "one and many": (1, 64)}
SOME = each(SIZES, ("one more", "eight times"))
RUNS = {
    "planned": PLANNED,
    "planned exactly": PLANNED | {"privacy.accountant": "prv", "privacy.epsilon": 20.0},
    "planned, several steps": PLANNED | {"train.steps": 2},
    "planned, held out": PLANNED | {"data.holdout": 0.5},
    "planned, limited": PLANNED | {"data.limit": 8},
    "given": {"privacy.expected-batch": 2},
    "the change": LOCAL | {"privacy.noise-multiplier": 0.0},
    "the change of all": LOCAL | {"privacy.noise-multiplier": 0.0, "train.steps": 0, "train.epochs": 2},
}


@pytest.mark.parametrize("sizes", SOME)
@pytest.mark.parametrize("run", RUNS)
def test_how_many_there_are_is_neither_planned_with_nor_written_down(run, sizes, tmp_path):
    less, more = neighbours(tmp_path, *(MANY[:size] for size in SIZES[sizes]))
    assert heard(less, RUNS[run]) == heard(more, RUNS[run])
    rows = [
        [(row.noise_multiplier, row.sample_rate, row.steps, row.epsilon) for row in node.rows()]
        for node in (less, more)
    ]
    assert rows[0] == rows[1] != []


@pytest.mark.parametrize("sizes", SOME)
@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_the_noise_of_a_change_is_as_large(clip, sizes, tmp_path):
    run = LOCAL | MANY_VALUES | {"privacy.noise-multiplier": 0.0, "privacy.epsilon": 1.0, "privacy.clip": clip}
    found = []
    for node in neighbours(tmp_path, *(MANY[:size] for size in SIZES[sizes])):
        change = update(node.ask("train", run), run)
        found.append(float(torch.cat([tensor.flatten() for tensor in change.values()]).std()))
    assert found[0] == pytest.approx(found[1], rel=0.08)


@pytest.mark.parametrize("sizes", SOME)
def test_the_noise_of_a_sum_is_as_large(sizes, tmp_path):
    run = PLANNED | {"train.steps": 2}
    found = []
    for node in neighbours(tmp_path, *(MANY[:size] for size in SIZES[sizes])):
        with sums() as released:
            node.ask("train", run)
        found.append([mechanism for mechanism, _ in released])
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.parametrize("sizes", SOME)
@pytest.mark.parametrize("mode", ["example", "update-local"])
def test_a_budget_ends_in_the_same_round(mode, sizes, tmp_path):
    run = {"privacy.expected-batch": 4, "privacy.noise-multiplier": 2.0, "privacy.mode": mode}
    found = []
    for node in neighbours(tmp_path, *(MANY[:size] for size in SIZES[sizes]), privacy_epsilon=2.5):
        turn = 0
        while not refused(answer := node.ask("train", run, round=turn)) and turn < 30:
            turn += 1
        assert 0 < turn < 30
        found.append((turn, failure(answer)))
    assert found[0] == found[1]


@pytest.mark.parametrize("sizes", SOME)
def test_weights_and_steps_are_not_counted_from_the_data(sizes, tmp_path):
    for number, run in enumerate(
        ({"train.weighting": "examples"}, {"train.steps": 0}, {"train.weighting": "declared"})
    ):
        less, more = neighbours(tmp_path / str(number), *(MANY[:size] for size in SIZES[sizes]))
        assert heard(less, run) == heard(more, run)


@pytest.mark.parametrize("sizes", SOME)
def test_what_is_personal_stays_as_large(sizes, bert, tmp_path):
    """A personal head, and a rule that keeps one factor at home."""
    run = {
        "model.name": bert,
        "lora.targets": "query,value",
        "rule.name": "fedsa-lora",
        "task.head": "local",
        **task(CLASSIFY),
    }
    options = {"task": {**CLASSIFY, "head": "local"}, "tables": {"models": [bert]}}
    less, more = neighbours(tmp_path, *(MANY[:size] for size in SIZES[sizes]), **options)
    assert heard(less, run) == heard(more, run)


def test_a_node_without_a_number_of_records_takes_no_part(tmp_path):
    node = Node(tmp_path)
    node.config.pop("records")
    assert refused(node.ask("train"))
    assert failure(node.ask("train", {"privacy.records": 8})) == ""


def test_a_mean_of_all_records_is_no_step(tmp_path):
    """The size of a step would be one over the number of records, if that were what it is divided by."""
    found = []
    for node in neighbours(tmp_path, MANY[:1], MANY[:1] * 2):
        with sums() as released:
            node.ask("train")
        found.append(released[0][1])
    assert float((found[1] - 2 * found[0]).norm()) <= 1e-6 * float(found[0].norm()) + 1e-12
