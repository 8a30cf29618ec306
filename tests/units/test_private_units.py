"""Units in private steps: a person's examples are one, and what goes wrong with some is not told."""

import math

import pytest

from common.error import BouquetError
from common.privacy.accounting import Release
from common.tasks import Example
from tests.support.private_steps import EXAMPLES, PLAIN, PRIVATE, fresh, gradients, out_of_memory, train_here, within


def test_what_one_person_changes_is_at_most_the_clipping_norm():
    people = [EXAMPLES[:4], EXAMPLES[4:5], EXAMPLES[5:]]
    seen = []
    for units in (people, people[1:]):
        with gradients() as step:
            train_here(fresh(), [], Release(0.0, 1.0, 1), units=units)
        seen.append(step[0] * PRIVATE.expected_batch)
    assert 0.99 < float((seen[0] - seen[1]).norm()) <= 1


def test_physical_batches_hold_whole_units_of_like_length():
    lengths = [(9, 2), (3,), (), (4,), (5, 5, 5, 5, 5), (2,), (8,)]
    units = [[Example([1] * length, [1] * length) for length in unit] for unit in lengths]
    model, batches = fresh(), []
    outputs = model.outputs

    def watched(batch):
        batches.append(batch["attention_mask"].sum(1).tolist())
        return outputs(batch)

    model.outputs = watched
    train_here(model, [], Release(1.0, 1.0, 1), config=PLAIN.model_copy(update={"batch_size": 3}), units=units)
    assert batches[-3:] == [[2, 3, 4], [5, 5, 5, 5, 5], [8, 9, 2]]


UNKNOWN = Example([1, 10, 5000], [1, 10, 5000])


def breaking(model, where):
    """The model fails on every batch that has token 1999 in it: in the forward pass, or in the backward pass."""
    outputs = model.outputs

    def compute(batch):
        output = outputs(batch)
        if (batch["input_ids"] == 1999).any():
            if where == "forward":
                out_of_memory()
            output.values.register_hook(out_of_memory)
        return output

    model.outputs = compute
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ("fast", "forward"),
        ("fast", "backward"),
        ("fast", "embedding"),
        ("hooks", "backward"),
        pytest.param("hooks", "forward", marks=pytest.mark.exhaustive),
        pytest.param("hooks", "embedding", marks=pytest.mark.exhaustive),
    ],
)
def test_what_fails_counts_as_zero_and_takes_nothing_with_it(engine, where, capsys):
    """The coordinator learns nothing of it: the step is the one without the unit that fails."""
    failing = UNKNOWN if where == "embedding" else Example([1, 10, 1999], [1, 10, 1999])
    privacy = PRIVATE.model_copy(update={"engine": engine})
    seen = []
    for data in (EXAMPLES, [*EXAMPLES[:3], failing, *EXAMPLES[3:]]):
        with gradients() as step:
            training = train_here(breaking(fresh(), where), data, Release(0.0, 1.0, 2), privacy)
        seen.append(step[0])
        assert math.isfinite(training.loss)
        assert training.tokens == 2 * sum(len(example.tokens) for example in EXAMPLES)
    assert float((seen[1] - seen[0]).norm()) < 1e-5 * float(seen[0].norm())
    printed = capsys.readouterr()
    assert printed.err.count("2 physical batches failed and were redone one unit at a time; 2 times a unit failed") == 1
    assert printed.out == ""


@pytest.mark.parametrize("units", [[], [[UNKNOWN]], [[], []]])
def test_without_a_unit_that_can_be_used_there_is_noise_alone(units):
    with gradients() as seen:
        training = train_here(fresh(), [], Release(2.0, 1.0, 1), units=units)
    assert (training.loss, training.tokens) == (0.0, 0)
    assert within(float(seen[0].std()), 2 / 4, 2 / 4 * (2 * len(seen[0])) ** -0.5)


def test_a_model_that_couples_examples_is_refused_before_a_look_at_them():
    model = fresh()
    outputs = model.outputs
    model.outputs = lambda batch: (output := outputs(batch))._replace(values=output.values * output.values.std())
    with gradients() as seen, pytest.raises(BouquetError, match="does not keep the examples of a batch apart"):
        train_here(model, [], Release(1.0, 1.0, 1))
    assert not seen
