"""Sequence classification: one class for a text, or for a pair of texts."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.error import BouquetError
from common.tasks.task import Example, Score, Task, encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A confusion matrix of more would be larger than an adapter.
MOST_CLASSES = 512


class Classify(Task):
    """Classes are the whole numbers from 0 to ``task.labels`` - 1."""

    sequence_classification = True
    metric = "accuracy"
    further = "macro-f1"

    def fields(self) -> list[str]:
        return [field for field in (self.config.text, self.config.text_pair, self.config.label) if field]

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Iterable[Example]:
        label = _class(record[self.config.label])
        if label is None or not 0 <= label < self.config.labels:
            raise BouquetError(
                "a label is out of range",
                where=f"field '{self.config.label}'",
                expected=f"a whole number from 0 to {self.config.labels - 1}",
                got=repr(record[self.config.label]),
                cure="Set task.labels to the number of classes.",
            )
        pair = record[self.config.text_pair] if self.config.text_pair else None
        yield self._asked(record[self.config.text], pair, tokenizer)._replace(labels=[label])

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """The text; where the task is about pairs, two texts with a tab between them."""
        if not self.config.text_pair:
            return self._asked(text, None, tokenizer)
        first, tab, second = text.partition("\t")
        if not tab:
            raise BouquetError("one text where two are compared", expected="a tab between them", got=repr(text))
        return self._asked(first, second, tokenizer)

    def _asked(self, text: str, pair: str | None, tokenizer: "PreTrainedTokenizerBase") -> Example:
        encoded = encoding(tokenizer, text, pair, truncation=True, max_length=self.config.max_length)
        return Example(encoded["input_ids"], [], encoded.get("token_type_ids", ()))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits.float(), labels)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits.float(), labels, reduction="none")

    def score(self, logits: Tensor, labels: Tensor) -> Score:
        loss = cross_entropy(logits.float(), labels, reduction="sum").item()
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


def _class(value: Any) -> int | None:
    """A class by its number; CSV has it as text. None for anything else."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) else None
