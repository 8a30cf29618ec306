"""Several labels, and numbers: what a record may say. And of every task with tallies, what a node may claim."""

import pytest
import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict

from common import tasks
from common.config.run import ModelConfig, TaskConfig
from common.config.section import ConfigError
from common.error import BouquetError
from common.models import base
from common.sources.fields import LeftOut
from common.tasks import Output
from server_app.scores import read_score
from strategies import read_config
from tests.support.grid import pose_as_an_app


def task(name, **settings):
    return tasks.build(TaskConfig.model_validate({"name": name, **settings}))


def labels(kind, label):
    (example,) = kind.encode({"text": "a text", "label": label}, base.load_tokenizer(ModelConfig()))
    return list(example.labels)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (["ham", "tea"], [1, 0, 1]),
        ("tea, ham", [1, 0, 1]),
        ('["tea", "ham"]', [1, 0, 1]),
        ([1, 0, 1], [1, 0, 1]),
        ([True, False, True], [1, 0, 1]),
        ([], [0, 0, 0]),
        ("", [0, 0, 0]),
        ("spam", [0, 1, 0]),
    ],
)
def test_several_labels_are_read_in_every_form(label, expected):
    kind = task("multi-label", classes="ham,spam,tea")
    assert labels(kind, label) == expected
    assert kind.collate(kind.encode({"text": "a", "label": label}, base.load_tokenizer(ModelConfig())), 0)[
        "labels"
    ].tolist() == [expected]


def test_another_mark_may_stand_between_labels():
    assert labels(task("multi-label", classes="ham,spam", separator="|"), "spam|ham") == [1, 1]
    with pytest.raises(ConfigError, match=r"task.separator: expected a comma or another separator, got ' '"):
        read_config({"task.separator": " "})


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (["ham", "coffee"], "a label is out of range .field 'label'.: expected one of ham, spam, tea, got 'coffee'"),
        ([0, 1, 0, 0], "out of range"),
        (["ham", "ham"], "a label occurs twice .*expected each class once, or a 0 or 1 for each of 3"),
        ([None], "an empty label"),
        ({"a": 1}, "a field is not text"),
    ],
)
def test_labels_that_are_none_are_told(label, said):
    with pytest.raises(BouquetError, match=said):
        labels(task("multi-label", classes="ham,spam,tea"), label)


def test_without_a_label_a_text_is_left_out():
    for name in ("multi-label", "regress"):
        with pytest.raises(LeftOut, match="without a label"):
            labels(task(name), None)


def test_balanced_weights_are_how_often_a_class_is_not_there():
    kind, tokenizer = (
        task("multi-label", classes="a,b,c", **{"class-weights": "balanced"}),
        base.load_tokenizer(ModelConfig()),
    )
    examples = [kind.encode({"text": "x", "label": label}, tokenizer)[0] for label in ("a", "a,b", "a", "")]
    output = Output(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 1.0]]))
    # b is in one of four, c in none, of which nothing is known.
    assert kind.weighed(examples).sums(output).item() == pytest.approx((1 + 3 + 1) / 3 * 0.693147, rel=1e-5)


@pytest.mark.parametrize(("label", "expected"), [(0, 0.0), ("2.5", 0.5), (5.0, 1.0)])
def test_a_number_is_a_share_of_its_range(label, expected):
    kind = task("regress", range="0,5")
    assert labels(kind, label) == [expected]
    assert kind.readings(torch.tensor([expected])) == {"label": pytest.approx(float(label))}


@pytest.mark.parametrize("label", [5.1, -1, "NaN", "inf", "high"])
def test_a_number_out_of_its_range_is_told(label):
    said = r"a label is out of range \(field 'label'\): expected a number from 0 to 5, .* Set task.range"
    with pytest.raises(BouquetError, match=said):
        labels(task("regress", range="0,5"), label)


@pytest.mark.parametrize("range", ["5,0", "0", "a,b", "0,inf", "nan,1", ""])
def test_a_range_that_is_none_is_a_mistake(range):
    with pytest.raises(ConfigError, match=r"task.range: expected two numbers separated by a comma, the lower first"):
        read_config({"task.range": range})


def output(kind):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2 * 40 if kind.rows == 2 else 40, 4, generator=generator).abs()
    if kind.name == "multi-label":
        return Output(values - 0.7, (torch.rand(40, 4, generator=generator) < 0.5).float())
    if kind.name == "regress":
        return Output(values[:, :1], torch.rand(40, generator=generator))
    first = torch.where(torch.arange(80) % 3 > 0, -1, -2)
    given = torch.cat([first[:, None], torch.full((80, 3), 7)], 1)
    return Output(values, given, reference=lambda: torch.rand(80, 4, generator=torch.Generator().manual_seed(2)))


def reply(score, tallies):
    """A node's message with its score."""
    pose_as_an_app()
    figures = {"loss": score.loss / score.count, "correct": score.correct, "count": score.count}
    content = RecordDict({"metrics": MetricRecord(figures), "tallies": MetricRecord(tallies)})
    return Message(content, dst_node_id=1, message_type=MessageType.EVALUATE)


LIES = {
    "multi-label": [("hits", 0, 41), ("misses", 3, 41), ("false-alarms", 1, -41)],
    "regress": [("moments", 0, -(2**34)), ("moments", 2, 2**30), ("moments", 3, -(2**28)), ("moments", 4, 2**40)],
    "dpo": [("margin", 0, 2**40), ("margin", 1, 2**40)],
    "kto": [("desirable", 0, 1), ("undesirable", 0, -1), ("undesirable", 2, 2**40)],
}


@pytest.mark.parametrize(("name", "lie"), [(name, lie) for name, all_lies in LIES.items() for lie in [None, *all_lies]])
def test_a_claim_has_to_add_up(name, lie):
    kind = task(name, **{"labels": 4} if name == "multi-label" else {})
    score = kind.score(output(kind))
    tallies = {key: list(values) for key, values in score.tallies.items()}
    if lie is None:
        read, _ = read_score(reply(score, tallies), kind)
        assert kind.figures(read) == pytest.approx(kind.figures(score))
        return
    key, place, more = lie
    tallies[key][place] += more
    with pytest.raises(BouquetError, match=r"a score that does not add up|a score without its tallies"):
        read_score(reply(score, tallies), kind)
