"""Figures that are no mean of the nodes' own: macro-F1 from summed confusion matrices, exact match without decoding."""

import pytest
import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from torch.nn.functional import one_hot
from torchmetrics.functional.classification import multiclass_f1_score

from common import tasks
from common.config.run import LoraConfig, ModelConfig, TaskConfig
from common.error import BouquetError
from common.models import adapted, base
from common.tasks import Example, Output, Score
from common.tasks.task import IGNORED
from server_app.scores import judged, read_score
from server_app.scoring import Evaluation
from tests.support.grid import pose_as_an_app

CLASSES = tasks.build(TaskConfig(name="classify", labels=4))
INSTRUCT = TaskConfig(name="instruct")


def scored(labels: list[int], predicted: list[int]) -> Score:
    return CLASSES.score(Output(one_hot(torch.tensor(predicted), 4).float(), torch.tensor(labels)))


def test_macro_f1_is_that_of_all_examples_together():
    one, two = scored([0, 0, 1], [0, 1, 1]), scored([1, 2, 2], [2, 2, 2])
    # Class 0: 1 of 2 found, nothing wrong. Class 1: one found, one missed, one wrong. Class 2: two found, one wrong.
    # Class 3 does not occur, and does not count.
    ideal = (2 / 3 + 2 / 4 + 4 / 5) / 3
    together = CLASSES.figures(one + two)
    assert together == {"accuracy": pytest.approx(4 / 6), "macro-f1": pytest.approx(ideal, rel=1e-6)}
    apart = (CLASSES.figures(one)["macro-f1"] + CLASSES.figures(two)["macro-f1"]) / 2
    assert abs(apart - ideal) > 0.05
    assert CLASSES.figures(Score() + one + two) == together


def test_macro_f1_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(0, 3, (2, 50), generator=generator)
    theirs = multiclass_f1_score(predicted, labels, 4, average="macro").item()
    parts = [scored(labels[part].tolist(), predicted[part].tolist()) for part in (slice(20), slice(20, 50))]
    assert CLASSES.figures(sum(parts, Score()))["macro-f1"] == pytest.approx(theirs, rel=1e-6)


def test_too_many_classes_have_no_confusion_matrix():
    many = tasks.build(TaskConfig(name="classify", labels=600))
    score = many.score(Output(torch.eye(600)[:3], torch.tensor([0, 1, 5])))
    assert score.tallies == {}
    assert many.figures(score) == {"accuracy": pytest.approx(2 / 3)}


def test_exact_match_is_what_greedy_decoding_gives():
    config = ModelConfig()
    model = adapted.load(config, LoraConfig(), INSTRUCT, "cpu")
    tokenizer, task = base.load_tokenizer(config), tasks.build(INSTRUCT)
    prompt = tokenizer("def get(self")["input_ids"]
    ids = torch.tensor([prompt])
    model.network.eval()
    with torch.no_grad():
        decoded = model.network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    answer = decoded[0, len(prompt) :].tolist()
    wrong = [*answer[:-1], answer[-1] + 1]
    examples = [Example(prompt + own, [IGNORED] * len(prompt) + own) for own in (answer, wrong, answer[:5])]
    score = model.score(task, examples, batch_size=2)
    assert score.tallies == {"exact": (2, 3)}
    figures = task.figures(score)
    assert list(figures) == ["perplexity", "exact-match"]
    assert figures["exact-match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("lie", [0.0, 1e6])
def test_no_single_node_of_four_decides_which_round_is_better(lie):
    def round_of(*losses: float) -> Evaluation:
        scores = {str(node): Score(100 * loss, 0, 100) for node, loss in enumerate(losses)}
        return Evaluation(0.0, judged(scores), {}, "", {name: score.loss / 100 for name, score in scores.items()})

    # The nodes' data are unlike: what each gains is far less than what lies between them.
    earlier, later = round_of(1.0, 2.0, 3.0, 1e6 - lie), round_of(0.9, 1.8, 2.7, lie)
    assert later.above(earlier) < 0 < earlier.above(later)


def test_of_fewer_than_four_nodes_rounds_are_judged_by_the_loss_over_all():
    assert Evaluation(0.0, 1.0, {}, "", {"a": 9.0}).above(Evaluation(0.0, 3.0, {}, "", {"a": 1.0})) == -2
    assert judged({"a": Score(10.0, 0, 10), "b": Score(60.0, 0, 20)}) == pytest.approx(70 / 30)


@pytest.mark.parametrize(
    ("tallies", "got"),
    [
        ({}, "a NoneType"),
        ({"confusion": [1] * 9}, "9 others"),
        ({"confusion": [-1] + [1] * 15}, "16 others"),
        ({"confusion": [0.5] * 16}, "16 others"),
        ({"confusion": 3}, "3"),
    ],
)
def test_a_score_without_the_tasks_tallies_is_refused(tallies, got):
    pose_as_an_app()
    content = RecordDict({"metrics": MetricRecord({"loss": 1.0, "correct": 3, "count": 16})})
    if tallies:
        content["tallies"] = MetricRecord(tallies)
    message = Message(content, dst_node_id=1, message_type=MessageType.EVALUATE)
    with pytest.raises(
        BouquetError, match=rf"without its tallies \(confusion\): expected 16 whole numbers .*got {got}"
    ):
        read_score(message, CLASSES)
    content["tallies"] = MetricRecord({"confusion": [1] * 16})
    with pytest.raises(BouquetError, match="a score that does not add up: expected parts of 16, got 3 right"):
        read_score(message, CLASSES)
    content["metrics"] = MetricRecord({"loss": 1.0, "correct": 4, "count": 16})
    assert read_score(message, CLASSES)[0].tallies == {"confusion": (1,) * 16}
