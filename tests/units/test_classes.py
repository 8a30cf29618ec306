"""Classes by name: labels in every form, weights, figures of each class."""

import pytest
import torch

from common import tasks
from common.config.run import ModelConfig, RunConfig, TaskConfig
from common.config.section import ConfigError
from common.error import BouquetError
from common.models import base
from common.tasks import Example, Output, Score


def task(**settings: object) -> tasks.Task:
    named = {key.replace("_", "-"): value for key, value in settings.items()}
    return tasks.build(TaskConfig.model_validate({"name": "classify", **named}))


def number(kind: tasks.Task, label: object) -> int:
    (example,) = kind.encode({"text": "a text", "label": label}, base.load_tokenizer(ModelConfig()))
    return example.labels[0]


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("ham,spam", ["ham", " spam "]),
        ("no, yes", ["no", "yes"]),
        ("1,2", ["1", 2.0]),
        ("1,2", [1, "2.00"]),
        ("false,true", [False, "True"]),
        ("-1,1", [-1, "1"]),
        ("0.5,NA", [0.5, "NA"]),
        ("", ["0", 1.0]),
        ("", [False, True]),
        ("", ["false", "TRUE"]),
        ("", ["00", "1e0"]),
    ],
)
def test_a_label_is_its_class_in_whatever_form(classes, labels):
    assert [number(task(classes=classes), label) for label in labels] == [0, 1]


def test_a_label_of_no_class_is_told_with_the_classes():
    said = r"a label is out of range \(field 'label'\): expected one of ham, spam, got 'Spam'. Set task.classes to the"
    with pytest.raises(BouquetError, match=said):
        number(task(classes="ham,spam"), "Spam")


@pytest.mark.parametrize("digits", ["9" * 5000, "1e999999999", "1e-999999999", "sNaN", "١٢"])
def test_a_number_without_end_is_a_label_like_another(digits):
    with pytest.raises(BouquetError, match="a label is out of range"):
        number(task(), digits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"task.classes": "a,b,a"},
            "task.classes: expected two or more different names, separated by commas, got 'a,b,a'",
        ),
        ({"task.classes": "a"}, "task.classes: expected two or more different names"),
        (
            {"task.classes": "a,b,c", "task.labels": 4},
            "task.labels: expected 3, the number of names in task.classes, got 4",
        ),
        ({"task.class-weights": "1,2,3"}, "task.class-weights: expected 'none', 'balanced', or 2 numbers of 0 or more"),
        ({"task.class-weights": "heavy"}, "task.class-weights: .* got 'heavy'"),
        ({"task.class-weights": "nan,1"}, "task.class-weights: .* got 'nan,1'"),
        ({"privacy.mode": "example", "task.class-weights": "balanced"}, "the same on every node in a private run"),
        ({"task.max-length": 3}, "task.max-length: expected 0, or 4 or more, got 3"),
    ],
)
def test_contradictions_are_told(settings, said):
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_flower(settings)


def test_the_names_decide_how_many_classes_there_are():
    assert RunConfig.from_flower({"task.classes": "a,b,c"}).task.labels == 3


def test_classes_weigh_as_the_run_says_or_as_a_nodes_own_counts_do():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    one, other = (task().loss(Output(logits[row : row + 1], labels[row : row + 1])) for row in (0, 1))
    torch.testing.assert_close(task(class_weights="3,1").loss(Output(logits, labels)), (3 * one + other) / 4)
    examples = [Example([1], [0])] * 3 + [Example([1], [1])]
    balanced = task(class_weights="balanced").weighed(examples)
    torch.testing.assert_close(balanced.loss(Output(logits, labels)), (one + 3 * other) / 4)
    assert task().weighed(examples).loss(Output(logits, labels)) == task().loss(Output(logits, labels))
    # A class that a node has none of weighs nothing odd.
    alone = task(class_weights="balanced").weighed([Example([1], [1])] * 2)
    assert alone.loss(Output(logits, labels)).isfinite()


def test_each_class_has_its_share_and_its_recall():
    score = Score(1.0, 5, 8, {"confusion": (3, 1, 0, 2, 2, 0, 0, 0, 0)})
    assert task(classes="ham,spam,none", labels=3).by_class(score) == {
        "ham": {"share": 0.5, "recall": 0.75},
        "spam": {"share": 0.5, "recall": 0.5},
        "none": {"share": 0.0},
    }
    assert list(task(labels=3).by_class(score)) == ["0", "1", "2"]
