"""A message that asks for a score and for training gets neither past what would stop it alone."""

import pytest

from common.privacy import ledger
from tests.attacks.hostile import PLAIN, POLICY, SCORED, Node, cost, failure, refused

NOISED = {"privacy.score-noise": 5.0}
SCORES = {"privacy": POLICY["privacy"] | {"scoring": True}}


def both(node, run, **options):
    return node.ask("train", run, config=SCORED, **options)


@pytest.mark.parametrize(
    ("run", "facts"),
    [
        (PLAIN, {}),
        (NOISED, {}),
        ({"privacy.mode": "update-central"}, {}),
        ({"train.weighting": "examples"}, {}),
        ({"rule.name": "fedit"}, {"tables": {"rules": ["ffa-lora"]}}),
        ({"task.max-length": 7}, {}),
        ({}, {"privacy_epsilon": 1e-4}),
    ],
    ids=["no noise", "a score", "noise elsewhere", "a weight", "another rule", "another task", "no budget"],
)
def test_what_neither_kind_gets_both_do_not(run, facts, tmp_path):
    node = Node(tmp_path, **facts)
    answer = both(node, run)
    assert "update" not in answer
    assert refused(answer)
    assert failure(answer) == failure(node.ask("train", run))
    assert [name for record in answer.metric_records.values() for name in record] == []
    assert not ledger.path(node.state).exists()


def test_each_is_charged_as_if_it_had_come_alone(tmp_path):
    together, apart = (Node(tmp_path / name, tables=SCORES) for name in ("together", "apart"))
    answer = both(together, NOISED, round=1)
    assert set(answer) == {"update", "metrics", "score"}
    assert dict(answer.metric_records["metrics"]) == {}
    assert set(answer.metric_records["score"]) == {"merit", "count"}
    for kind in ("evaluate", "train"):
        apart.ask(kind, NOISED, round=1)
    told = [[(row.round, row.release, row.epsilon) for row in node.rows()] for node in (together, apart)]
    assert told[0] == told[1]
    assert [turn for turn, *_ in told[0]] == [1, 2]


@pytest.mark.parametrize(
    ("score_noise", "left"),
    [(5.0, {"score", "failure"}), (0.05, {"unscored", "update", "metrics"})],
    ids=["the score", "the training"],
)
def test_a_budget_for_one_of_them_pays_for_that_one(score_noise, left, tmp_path):
    """A score at 5.0 costs what the training does; one at 0.05 far more than there is."""
    node = Node(tmp_path, tables=SCORES, privacy_epsilon=1.2 * cost(1))
    answer = both(node, {"privacy.score-noise": score_noise})
    assert set(answer) == left
    reason = answer.config_records["failure" if "failure" in left else "unscored"]["reason"]
    assert str(reason).startswith("the privacy budget of this node is spent")
    assert len(node.rows()) == 1


@pytest.mark.parametrize("wanted", [1, "yes", b"true", [True], 1.0])
def test_only_a_plain_yes_asks_for_a_score(wanted, tmp_path):
    node = Node(tmp_path, tables=SCORES)
    assert set(node.ask("train", NOISED, config={"score": wanted})) == {"update", "metrics"}
    assert len(node.rows()) == 1
