"""Sequence classification: one class for a text, or for a pair of texts."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.sources.fields import LeftOut, words
from common.tasks.classes import label
from common.tasks.headed import Classed
from common.tasks.score import Score
from common.tasks.task import Example, Output

# A confusion matrix of more would be larger than an adapter.
MOST_CLASSES = 512


class Classify(Classed):
    """Classes are those of ``task.classes``, or the whole numbers from 0 to ``task.labels`` - 1, true and false."""

    name = "classify"

    label_type = torch.long
    metric = "accuracy"
    further = "macro-f1"

    def named(self, record: Mapping[str, Any]) -> Sequence[str]:
        return [label(said)] if (said := words(record.get(self.config.label), self.config.label)) else []

    def told(self, example: Example) -> Sequence[str]:
        return [self.classes[int(number)] for number in example.labels]

    def readings(self, values: Tensor) -> Mapping[str, float]:
        """The probability of each class."""
        return dict(zip(self.classes, values.float().softmax(-1).tolist(), strict=True))

    def read(self, record: Mapping[str, Any]) -> Sequence[int]:
        if not (said := words(record.get(self.config.label), self.config.label)):
            raise LeftOut("label")
        return [self._classes.number(said, record[self.config.label])]

    def any_label(self, draw: random.Random) -> str:
        return draw.choice(self.classes)

    def wrong_label(self, record: Mapping[str, Any], draw: random.Random) -> str:
        return draw.choice([name for name in self.classes if name != str(record.get(self.config.label))])

    def weighed(self, examples: Sequence[Example]) -> "Classify":
        """The task with the weights that balance the classes of ``examples``, where the run wants that."""
        if self.config.class_weights != "balanced":
            return self
        counts = torch.tensor([int(label) for example in examples for label in example.labels]).bincount(
            minlength=self.config.labels
        )
        balanced = type(self)(self.config)
        balanced._weights = len(examples) / (counts.clamp(min=1) * (counts > 0).sum())
        return balanced

    def made_up(self, tokens: list[int], number: int) -> Example:
        return Example(tokens, [number % self.config.labels])

    def sums(self, output: Output) -> Tensor:
        weights = self.weights(output.labels)
        return weights * cross_entropy(output.values.float(), output.labels, reduction="none")

    def weights(self, labels: Tensor) -> Tensor:
        return self._weights.to(labels.device)[labels]

    def score(self, output: Output) -> Score:
        """The unweighted loss, whatever the classes weigh in training."""
        logits, labels = output.values.float().cpu(), output.labels.cpu()
        loss = cross_entropy(logits, labels, reduction="sum").item()
        predicted = logits.argmax(-1)
        tallies = {}
        if self.tally_sizes():
            # It takes seconds to import, and only scoring needs it.
            from torchmetrics.functional.classification import multiclass_confusion_matrix

            confusion = multiclass_confusion_matrix(predicted, labels, self.config.labels, validate_args=False)
            tallies["confusion"] = tuple(confusion.flatten().tolist())
        return Score(loss, int((predicted == labels).sum()), len(labels), tallies)

    def tally_sizes(self) -> Mapping[str, int]:
        """The confusion matrix, row by row: how many examples of each class were taken for each."""
        return {"confusion": self.config.labels**2} if self.config.labels <= MOST_CLASSES else {}

    def adds_up(self, score: Score) -> bool:
        """Every example stands once in the confusion matrix, the right ones on its diagonal."""
        confusion = score.tallies.get("confusion")
        if confusion is None:
            return True
        return sum(confusion) == score.count and sum(confusion[:: self.config.labels + 1]) == score.correct

    def figures(self, score: Score) -> dict[str, float]:
        """Accuracy, and macro-F1: the mean over the classes that occur, of the labels or of the predictions."""
        found = super().figures(score)
        if "confusion" in score.tallies:
            # From the counts, since a node may claim so many examples that they cannot be laid out one by one.
            confusion = torch.tensor(score.tallies["confusion"], dtype=torch.float64).view(self.config.labels, -1)
            occurring = confusion.sum(0) + confusion.sum(1)
            f1 = 2 * confusion.diagonal() / occurring
            found[self.further] = f1[occurring > 0].mean().item()
        return found

    def by_class(self, score: Score) -> dict[str, dict[str, float]]:
        if "confusion" not in score.tallies:
            return {}
        rows = torch.tensor(score.tallies["confusion"], dtype=torch.float64).view(self.config.labels, -1)
        found = {}
        for name, row, right in zip(self.classes, rows, rows.diagonal(), strict=True):
            recall = {"recall": float(right / row.sum())} if row.sum() else {}
            found[name] = {"share": float(row.sum() / max(1, score.count)), **recall}
        return found
