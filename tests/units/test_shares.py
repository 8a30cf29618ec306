"""Who computes what of a step: every item once, whatever the number of processes."""

import pytest

from client_app.shares import deal, deal_batches

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
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("batches", STEPS)
def test_every_example_is_dealt_to_one_process_in_batches_no_larger(batches, apart, number):
    dealt = deal_batches(batches, number, apart)
    assert len(dealt) == number
    found = [example for own in dealt for batch in own for example in batch]
    assert sorted(found) == [example for batch in batches for example in batch]
    for batch in (batch for own in dealt for batch in own):
        assert any(set(batch) <= set(whole) for whole in batches)
        if not apart:
            assert batch in batches
    if apart:
        sizes = [sum(map(len, own)) for own in dealt]
        # Uneven by one for each batch that is cut, or by one that is whole and short.
        assert max(sizes) - min(sizes) <= max(len(batches), *map(len, batches), 0)


def test_one_process_has_the_batches_as_they_are():
    assert [deal_batches(batches, 1, True) for batches in STEPS] == [[batches] for batches in STEPS]


def test_units_are_dealt_in_turn_and_some_processes_may_have_none():
    assert deal([7, 3, 9], 2) == [[7, 9], [3]]
    assert deal([4], 3) == [[4], [], []]
    assert deal([], 2) == [[], []]
