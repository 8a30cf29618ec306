"""Who computes what of a step: every item once, whatever the number of processes."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from client_app import group
from client_app.crossing import packed, unpacked
from client_app.group import Group
from client_app.shares import Sums, deal, deal_batches
from common import tasks
from common.config.run import TaskConfig
from common.sources.images import ImageFile
from common.tasks import Example

STEPS = [
    [[0, 1, 2, 3]],
    [[0]],
    [[0, 1, 2], [3]],
    [[0, 1], [2, 3], [4]],
    [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]],
    [[]],
    [],
]


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("divisible", [True, False])
@pytest.mark.parametrize("batches", STEPS)
def test_every_example_is_dealt_to_one_process_in_batches_no_larger(batches, divisible, number):
    dealt = deal_batches(batches, number, divisible)
    assert len(dealt) == number
    found = [example for own in dealt for batch in own for example in batch]
    assert sorted(found) == [example for batch in batches for example in batch]
    for batch in (batch for own in dealt for batch in own):
        assert any(set(batch) <= set(whole) for whole in batches)
        if not divisible:
            assert batch in batches
    if divisible:
        sizes = [sum(map(len, own)) for own in dealt]
        # Uneven by one for each batch that is cut, or by one that is whole and short.
        assert max(sizes) - min(sizes) <= max(len(batches), *map(len, batches), 0)


def test_one_process_has_the_batches_as_they_are():
    assert [deal_batches(batches, 1, True) for batches in STEPS] == [[batches] for batches in STEPS]


def test_units_are_dealt_in_turn_and_some_processes_may_have_none():
    assert deal([7, 3, 9], 2) == [[7, 9], [3]]
    assert deal([4], 3) == [[4], [], []]
    assert deal([], 2) == [[], []]


def test_examples_cross_as_they_are():
    images = (ImageFile(Path("/data/a.png")), ImageFile(content=b"\x89PNG\xff"))
    third = Example([7], [2], [])
    every = [
        Example([1, 2], [-100, 2], []),
        Example([1], [0.5], [0], True, Example([4, 5], [1], [], against=third), images),
    ]
    for units in ([every, [], [third]], [[]], []):
        assert unpacked(packed(units)) == units


@pytest.mark.parametrize(("negatives", "whole"), [("batch", True), ("own", False)])
def test_a_batch_whose_examples_are_told_from_each_other_is_not_divided(negatives, whole):
    task = tasks.build(TaskConfig(name="embed", negatives=negatives))
    assert deal_batches([[0, 1, 2, 3]], 2, task.divisible) == ([[[0, 1, 2, 3]], []] if whole else [[[0, 2]], [[1, 3]]])


@pytest.mark.parametrize("name", [name for name, kind in tasks.TASKS.items() if not kind.apart])
def test_no_batch_is_divided_where_examples_look_at_each_other(name):
    assert not tasks.build(TaskConfig(name=name)).divisible


def test_who_has_done_its_share_waits_for_the_first_process_however_long_that_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(group, "PATIENCE", timedelta(seconds=1))
    parameters = [torch.zeros(2)]

    def wait_for_the_first() -> None:
        Group(tmp_path / "store", 1, 2).add_up(parameters, Sums([torch.ones(2)], [1.0]))

    with ThreadPoolExecutor(1) as other:
        done = other.submit(wait_for_the_first)
        first = Group(tmp_path / "store", 0, 2)
        time.sleep(2)
        sums = first.add_up(parameters, Sums([torch.ones(2)], [2.0]))
        done.result()
    assert (sums.gradients[0].tolist(), list(sums.figures)) == ([2.0, 2.0], [3.0])
