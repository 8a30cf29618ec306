"""Kind 1: numbers at which clipping, or the noise, would lose itself in the arithmetic."""

import math

import pytest
import torch

from tests.attacks.hostile import CLASSIFY, LOCAL, RECORDS, Node, failure, start, task, turned, update
from tests.attacks.taps import sums

ELSEWHERE = [{**record, "text": f"class C{n}:\n    y = {n}\n"} for n, record in enumerate(RECORDS)]
LARGE = 256  # values; of fewer, two noises may agree by chance


def parts(**factors):
    """Every tensor times a factor of its kind, from a start in which B is not zero."""

    def change(key, tensor):
        tensor = torch.full_like(tensor, 0.01) if key.part == "B" else tensor
        return tensor * factors.get(key.part, 1.0)

    return change


def one_value(value):
    """One bad value in every A."""

    def change(key, tensor):
        if key.part == "A":
            tensor.view(-1)[0] = value
        return tensor

    return change


def by_turns(small, large):
    """Layers of very different size."""
    return lambda key, tensor: tensor * (large if "q_proj" in key.layer else small)


def agreement(first, second):
    """The largest cosine between the changes of two replies, over the tensors of many values; NaN counts as zero."""
    found = [0.0]
    for key, change in first.items():
        a, b = change.flatten(), second[key].flatten()
        if len(a) >= LARGE and a.isfinite().all() and b.isfinite().all() and a.any() and b.any():
            a, b = a / a.abs().max(), b / b.abs().max()
            found.append(float(a @ b / (a.norm() * b.norm())))
    return max(found)


def same(first, second):
    """Whether two replies are the same, NaN included."""
    return all(torch.equal(first[key].nan_to_num(7.0), second[key].nan_to_num(7.0)) for key in first)


TINY = parts(A=1e-26)
CASES = {
    "clip below float32's squares": ({"privacy.clip": 1e-30, "train.learning-rate": 1e18}, TINY),
    "clip further below": ({"privacy.clip": 1e-35, "train.learning-rate": 1e18}, TINY),
    "clip below float32": ({"privacy.clip": 1e-60, "train.learning-rate": 1e18}, TINY),
    "clip below, automatic": (
        {"privacy.clip": 1e-30, "train.learning-rate": 1e18, "privacy.clipping": "automatic"},
        TINY,
    ),
    "clip below, fedit": (
        {"privacy.clip": 1e-30, "train.learning-rate": 1e18, "rule.name": "fedit"},
        parts(A=1e-24, B=1e-24),
    ),
    "clip below, bf16 up": ({"privacy.clip": 1e-30, "train.learning-rate": 1e18, "wire.up": "bf16"}, TINY),
    "rate beyond": ({"train.learning-rate": 1e30}, TINY),
    "least clip, tiny state": ({"privacy.clip": 1e-4, "train.learning-rate": 10.0}, TINY),
    "least clip, denormal state": ({"privacy.clip": 1e-4, "train.learning-rate": 10.0}, parts(A=1e-42)),
    "least clip, huge state": ({"privacy.clip": 1e-4, "train.learning-rate": 10.0}, parts(A=1e30)),
    "huge B": ({"train.learning-rate": 10.0}, parts(B=1e30)),
    "large B": ({"train.learning-rate": 10.0}, parts(B=1e5)),
    "layers apart": ({"privacy.clip": 1e-4, "train.learning-rate": 10.0}, by_turns(1e-26, 1e12)),
    "layers further apart": ({"privacy.clip": 1e-4, "train.learning-rate": 10.0}, by_turns(1e-38, 1e22)),
    "one NaN": ({}, one_value(math.nan)),
    "one infinity": ({}, one_value(math.inf)),
    "one minus infinity": ({}, one_value(-math.inf)),
    "a core, tiny": ({"rule.name": "ravan", "lora.rank": 4, "privacy.clip": 1e-4}, parts(A=1e-26, R=1e-10)),
    "the change, clip below": ({**LOCAL, "privacy.clip": 1e-30, "train.learning-rate": 1.0}, parts()),
    "the change, tiny": ({**LOCAL, "privacy.clip": 1e-4, "train.learning-rate": 10.0}, TINY),
    "the change, huge": ({**LOCAL, "train.learning-rate": 10.0}, parts(A=1e25)),
    "the change of a large state": ({**LOCAL, "train.learning-rate": 10.0}, parts(B=1e8)),
    "the change, one NaN": ({**LOCAL}, one_value(math.nan)),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_numbers_noise_covers_what_the_data_does(case, tmp_path):
    """Two replies to the same data agree no more than noise does; where no noise shows, nothing of the data does."""
    run, change = CASES[case]
    state = turned(start(run), change)
    node, other = Node(tmp_path / "node"), Node(tmp_path / "other", ELSEWHERE)
    first, second, third = (own.ask("train", run, state=state) for own in (node, node, other))
    if failure(first):
        assert failure(first) == failure(second) == failure(third).replace("/other", "/node")
        return
    changes = [update(answer, run, state) for answer in (first, second, third)]
    if same(changes[0], changes[1]):
        assert same(changes[0], changes[2])
    else:
        assert agreement(changes[0], changes[1]) < 0.5


@pytest.mark.parametrize("case", CASES)
def test_no_sum_is_longer_than_its_examples_clipped(case, tmp_path):
    run, change = CASES[case]
    node = Node(tmp_path)
    with sums() as found:
        node.ask("train", run, state=turned(start(run), change))
    for mechanism, total in found:
        most = len(RECORDS) * mechanism.sensitivity
        assert float(total.norm()) <= most * (1 + 1e-6)


@pytest.mark.parametrize("clip", [1e-30, 1e-4])
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-6, 1e6, 1e30])
def test_the_scale_in_a_message_moves_no_example_past_the_clip(scale, clip, tmp_path):
    run = {"privacy.clip": clip, "train.learning-rate": 1.0, **task(CLASSIFY)}
    state = turned(start(run), parts(), scale=scale)
    node = Node(tmp_path, task=CLASSIFY)
    with sums() as found:
        answers = [node.ask("train", run, state=state) for _ in range(2)]
    assert failure(answers[0]) == failure(answers[1])
    assert all(float(total.norm()) <= len(RECORDS) * clip * (1 + 1e-6) for _, total in found)
