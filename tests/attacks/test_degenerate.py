"""Kind 9: numbers that no honest run has: refused at once, and never a node that hangs or falls."""

import pytest

from tests.attacks.hostile import LOCAL, Node, failure, refused, start, turned
from tests.attacks.tools import FORK, apart

SECONDS = 30.0  # of a machine that is busy; what is refused needs a hundredth of one
PLANNED = {"privacy.noise-multiplier": 0.0}

REFUSED = {
    "hardly any noise": {"privacy.noise-multiplier": 1e-160},
    "less than float64's squares": {"privacy.noise-multiplier": 1e-200},
    "denormal noise": {"privacy.noise-multiplier": 5e-324},
    "little noise": {"privacy.noise-multiplier": 1e-5},
    "far too much noise": {"privacy.noise-multiplier": 1e300},
    "negative noise": {"privacy.noise-multiplier": -1.0},
    "a huge clip": {"privacy.clip": 1e300},
    "a tiny clip": {"privacy.clip": 1e-300},
    "no clip": {"privacy.clip": 0.0},
    "a large clip": {"privacy.clip": 1e5},
    "a huge epsilon": PLANNED | {"privacy.epsilon": 1e308},
    "a tiny epsilon": PLANNED | {"privacy.epsilon": 1e-300},
    "a delta near one": PLANNED | {"privacy.delta": 0.999},
    "a tiny delta": PLANNED | {"privacy.delta": 1e-300},
    "no delta": PLANNED | {"privacy.delta": 0.0},
    "a batch of everybody": {"privacy.expected-batch": 10**10},
    "no batch": {"privacy.expected-batch": 0},
    "no steps": {"train.steps": 0},
    "a rate beyond": {"train.learning-rate": 1e18},
    "a rate for the head beyond": {"train.head-learning-rate": 1e18},
    "not a number": {"privacy.clip": float("nan")},
    "infinite noise": {"privacy.noise-multiplier": float("inf")},
    "a negative rate": {"train.learning-rate": -1.0},
    "no classes": {"task.labels": 0},
    "no length": {"task.max-length": 0},
    "a head that is none": {"task.head": "other"},
    "an engine of old": {"gradient.name": "ghost"},
}

# Answered in whatever way, but answered.
ANSWERED = {
    "rounds without end": {"num-server-rounds": 10**12},
    "rounds without end, planned": PLANNED | {"num-server-rounds": 10**12},
    "rounds beyond float64": PLANNED | {"num-server-rounds": 10**400},
    "rounds beyond float64, exactly": PLANNED | {"num-server-rounds": 10**400, "privacy.accountant": "prv"},
    "least noise": {"privacy.noise-multiplier": 0.01, "privacy.accountant": "prv"},
    "least epsilon": PLANNED | {"privacy.epsilon": 1e-3, "privacy.accountant": "prv"},
    "largest epsilon": PLANNED | {"privacy.epsilon": 1e4, "privacy.accountant": "prv"},
    "least delta": PLANNED | {"privacy.delta": 1e-15, "privacy.accountant": "prv"},
    "largest delta": PLANNED | {"privacy.delta": 0.1, "privacy.accountant": "prv"},
    "the least clip": {"privacy.clip": 1e-4},
    "the largest clip": {"privacy.clip": 1e4},
    "the most noise": {"privacy.noise-multiplier": 1e6},
    "a batch of a thousand millions": {"privacy.expected-batch": 10**9},
    "of as many records": {"privacy.expected-batch": 10**9, "privacy.records": 10**9},
    "a huge rank": {"lora.rank": 10**9},
    "a huge alpha": {"lora.alpha": 1e300},
    "a huge seed": {"seed": 10**400},
    "a round of every record": {"train.epochs": 10**12},
}


@pytest.fixture(autouse=True, scope="module")
def _imported(tmp_path_factory):
    """What a process of its own would else import, load and reckon by itself, every time."""
    assert failure(Node(tmp_path_factory.mktemp("first")).ask("train")) == ""


def answered(node, run, kind="train", **options):
    """Whether the node refuses, or what else it does, in a process of its own."""

    def ask():
        answer = node.ask(kind, run, **options)
        return "refused" if refused(answer) else "failed" if failure(answer) else "done"

    return apart(ask, SECONDS)


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_honest_run_has_is_refused_at_once(what, tmp_path):
    node = Node(tmp_path)
    assert answered(node, REFUSED[what], "query") == "refused"
    assert answered(node, REFUSED[what]) == "refused"


@pytest.mark.parametrize("what", ["hardly any noise", "a huge clip", "a tiny clip", "far too much noise"])
def test_and_for_the_whole_change(what, tmp_path):
    assert answered(Node(tmp_path), LOCAL | REFUSED[what]) == "refused"


@pytest.mark.parametrize("what", ANSWERED)
def test_what_is_hard_to_reckon_with_hangs_no_node(what, tmp_path):
    node = Node(tmp_path)
    assert answered(node, ANSWERED[what]) in ("refused", "failed", "done")


@pytest.mark.parametrize("round", [10**6, 2**31])
def test_nor_does_a_round_from_far_away(round, tmp_path):
    assert answered(Node(tmp_path), {}, round=round) in ("refused", "failed", "done")


@pytest.mark.parametrize("value", [1e-45, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("mode", ["example", "update-local"])
def test_nor_does_a_state_at_the_end_of_float32(mode, value, tmp_path):
    state = turned(start(), lambda key, tensor: tensor.fill_(value))
    assert answered(Node(tmp_path), {"privacy.mode": mode}, state=state) in ("refused", "failed", "done")


def test_a_process_that_hangs_is_seen_to_hang():
    assert apart(lambda: FORK.Event().wait(60), 0.2) == "hung"
    assert apart(lambda: [b""] * 10**12, 5.0) == "crashed"
