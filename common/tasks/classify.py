"""Sequence classification: one class for a text, or for a pair of texts."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.config.run import TaskConfig
from common.error import BouquetError
from common.sources.fields import LeftOut, text, words
from common.tasks.task import Example, Output, Score, Task, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 10**18
"""A label beyond is a word, whatever it is."""
# A confusion matrix of more would be larger than an adapter.
MOST_CLASSES = 512


class Classify(Task):
    """Classes are those of ``task.classes``, or the whole numbers from 0 to ``task.labels`` - 1, true and false."""

    name = "classify"

    sequence_classification = True
    metric = "accuracy"
    further = "macro-f1"

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        numbers = {str(number): number for number in range(config.labels)} | {"false": 0, "true": 1}
        self._classes = {label(name): number for number, name in enumerate(config.names)} or numbers
        self._weights = torch.tensor(config.weights or [1.0] * (1 + max(self._classes.values())))

    def fields(self) -> list[str]:
        return [field for field in (self.config.text, self.config.text_pair, self.config.label) if field]

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        said = words(record.get(self.config.label), self.config.label)
        if not said:
            raise LeftOut("label")
        if (number := self._classes.get(label(said), -1)) < 0:
            raise BouquetError(
                "a label is out of range",
                where=f"field '{self.config.label}'",
                expected=self._expected(),
                got=repr(record[self.config.label])[:80],
                cure="Set task.classes to the labels in their order, with commas, or task.labels to their number.",
            )
        first = text(record, self.config.text)
        pair = text(record, self.config.text_pair) if self.config.text_pair else None
        return [self._asked(first, pair, tokenizer)._replace(labels=[number])]

    def _expected(self) -> str:
        names = self.config.names
        return f"one of {', '.join(names)}" if names else f"a whole number from 0 to {self.config.labels - 1}"

    def weighed(self, examples: Sequence[Example]) -> "Classify":
        """The task with the weights that balance the classes of ``examples``, where the run wants that."""
        if self.config.class_weights != "balanced":
            return self
        counts = torch.tensor([label for example in examples for label in example.labels]).bincount(
            minlength=self.config.labels
        )
        balanced = type(self)(self.config)
        balanced._weights = len(examples) / (counts.clamp(min=1) * (counts > 0).sum())
        return balanced

    def made_up(self, tokens: list[int], number: int) -> Example:
        return Example(tokens, [number % self.config.labels])

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """The text; where the task is about pairs, two texts with a tab between them."""
        if not self.config.text_pair:
            return self._asked(text, None, tokenizer)
        first, tab, second = text.partition("\t")
        if not tab:
            raise BouquetError("one text where two are compared", expected="a tab between them", got=repr(text))
        return self._asked(first, second, tokenizer)

    def _asked(self, text: str, pair: str | None, tokenizer: "PreTrainedTokenizerBase") -> Example:
        encoded = tokenized(tokenizer, text, pair, verbose=False)
        if cut := len(encoded["input_ids"]) > self.length:
            encoded = tokenized(tokenizer, text, pair, truncation=True, max_length=self.length)
        return Example(encoded["input_ids"], [], encoded.get("token_type_ids", ()), cut)

    def sums(self, output: Output) -> Tensor:
        weights = self.weights(output.labels)
        return weights * cross_entropy(output.values.float(), output.labels, reduction="none")

    def losses(self, output: Output) -> Tensor:
        return self.sums(output)

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

    def figure(self, score: Score) -> float:
        """Accuracy, from 0 to 1."""
        return score.correct / score.count

    def merit(self, score: Score) -> float:
        """The share of right answers."""
        return self.figure(score)

    def score_of(self, merit: float, count: float) -> Score:
        return Score(loss=count - merit, correct=round(merit), count=round(count))

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
        names = self.config.names or [str(number) for number in range(self.config.labels)]
        found = {}
        for name, row, right in zip(names, rows, rows.diagonal(), strict=True):
            recall = {"recall": float(right / row.sum())} if row.sum() else {}
            found[name] = {"share": float(row.sum() / max(1, score.count)), **recall}
        return found


def label(said: str) -> str:
    """One text for all forms of a label that a file format gives it: 0, 0.0 and "0" are one, True and "true"."""
    said = said.strip()
    if said.casefold() in ("true", "false"):
        return said.casefold()
    try:
        number = Decimal(said)
        whole = abs(number) < LARGEST and number == int(number)
    except (ArithmeticError, ValueError):
        return said
    return str(int(number)) if whole else said
