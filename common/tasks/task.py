"""The contract of a task: from a record to token ids, from a model's output to a loss and a score."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from common.config.run import TaskConfig
from common.error import BouquetError, did_you_mean
from common.sources.images import ImageFile
from common.tasks.score import Score
from common.tasks.sight import Sight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
USUAL = 128
"""The most tokens of an example where the run leaves it open and nobody has looked (``common/models/lengths.py``)."""

CONVERSATIONS = frozenset({"messages", "conversations"})
"""The fields of records that are conversations."""

Batch = dict[str, Tensor]


class Output(NamedTuple):
    """What a model makes of a batch of N rows, and the labels beside it.

    ``values`` are what its head says of each row (N x C), or the row's vector of length 1 (N x d); of a language model,
    the loss of each labelled token, N x T, zero where there is no label, and ``right`` (N x T, of what is scored) says
    which of them were the likeliest.
    ``reference`` computes the values of the model without its adapter, for tasks that compare the two. ``rows`` makes
    N x T x d of what a layer saw or made of the batch, whose padding it may have been spared.
    """

    values: Tensor
    labels: Tensor
    right: Tensor | None = None
    reference: Callable[[], Tensor] | None = None
    rows: Callable[[Tensor], Tensor] | None = None


class Example(NamedTuple):
    """One training example: token ids, and a label a token (``IGNORED`` where none), or what a head is to say of them.

    ``segments`` tell the two texts of a pair apart, a number a token, for models that are told; empty where none is.
    ``cut`` says that the record holds more than fits. ``against`` is the text that this one is compared with, for tasks
    whose examples are several rows of a batch; a third text stands against the second. ``images`` are those that stand
    among the tokens, in their order.
    """

    tokens: list[int]
    labels: Sequence[float]
    segments: Sequence[int] = ()
    cut: bool = False
    against: "Example | None" = None
    images: Sequence[ImageFile] = ()

    @property
    def texts(self) -> "tuple[Example, ...]":
        """The rows that the example is in a batch."""
        return (self,) if self.against is None else (self, *self.against.texts)

    @property
    def length(self) -> int:
        """Tokens of the longest of its texts."""
        return max(len(each.tokens) for each in self.texts)


class Task(ABC):
    """What a model is taught. A long class: every question that a task may be asked, with the answer of most."""

    name: ClassVar[str]
    sequence_classification: ClassVar[bool] = False
    """Whether a head says something of a whole text, in the place of its next words."""
    language: ClassVar[bool] = True
    """Whether it is a language model that is taught, what a text says next."""
    rows: ClassVar[int] = 1
    """How many rows of a batch are one example: the first rows of all of N, then the second ones, and so on."""
    beside: ClassVar[Sequence[str]] = ("against",)
    """What the rows after the first are called."""
    apart: ClassVar[bool] = True
    """Whether what an example adds to the loss depends on its own rows alone, or does by some setting."""
    compares: ClassVar[bool] = False
    """Whether what is learned is compared with what the base says."""
    sees: ClassVar[bool] = False
    """Whether its records hold images."""
    windows: ClassVar[bool] = False
    """Whether a long text is several examples, so that none is cut."""
    metric: ClassVar[str]
    rises: ClassVar[bool] = True
    """Whether a higher figure of the metric is a better one."""
    further: ClassVar[str] = ""
    """A second figure, from the tallies; empty where there is none."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    @classmethod
    def outputs(cls, config: TaskConfig) -> int | None:
        """How many numbers a head says of a text; 0 of a language model, None where a text's vector is wanted."""
        return config.labels if cls.sequence_classification else 0

    @property
    def divisible(self) -> bool:
        """Whether a batch may be computed in parts: where what an example adds to the loss does not depend on it."""
        return self.apart

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, in their order; none where nothing is told apart."""
        return ()

    @abstractmethod
    def fields(self) -> list[str]:
        """The fields that every record must have."""

    @property
    def length(self) -> int:
        """The most tokens of an example."""
        return self.config.max_length or USUAL

    @abstractmethod
    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        """The examples in one record.

        Raises :class:`LeftOut` where it holds nothing to learn, :class:`BouquetError` where it is not
        what the task reads.
        """

    def named(self, record: Mapping[str, Any]) -> Sequence[str]:
        """The classes that a record names, whatever the config says of them.

        Raises :class:`BouquetError` on what can be no label.
        """
        return ()

    def told(self, example: Example) -> Sequence[str]:
        """The labels of an example in words; none where all that is learned stands among its tokens."""
        return ()

    def facts(self) -> Mapping[str, str]:
        """What whoever is given a trained model has to know, by title."""
        return {}

    def readings(self, values: Tensor) -> Mapping[str, float]:
        """What a head's values of one text (C) mean, by name: shares of the classes, or a number in its own unit."""
        raise NotImplementedError("a task without a head")

    @abstractmethod
    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        """The fields of a made-up record: ``text`` is what is learned, or labelled; ``prompt`` what goes before it."""

    @abstractmethod
    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        """The fields of ``record`` that teach something, exchanged for something wrong; ``other`` is another record."""

    @abstractmethod
    def made_up(self, tokens: list[int], number: int) -> Example:
        """An example of these tokens, five or more, with any valid label: another one by another ``number``."""

    @abstractmethod
    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """What the model is given to answer ``text``, as in training; without labels."""

    @abstractmethod
    def sums(self, output: Output) -> Tensor:
        """The training loss of every example by itself, N values; of several tokens the sum."""

    @abstractmethod
    def weights(self, labels: Tensor) -> Tensor:
        """What every example weighs in a mean, N values: its labelled tokens, or the weight of its class."""

    def loss(self, output: Output) -> Tensor:
        """The mean loss of a batch: a scalar."""
        return self.sums(output).sum() / self.weights(output.labels).sum()

    def losses(self, output: Output) -> Tensor:
        """What every example adds in a private step, N values, each from its own row only: its mean over its tokens."""
        weights = self.weights(output.labels)
        return self.sums(output) / torch.where(weights > 0, weights, 1)

    def weighed(self, examples: Sequence[Example]) -> "Task":
        """The task with a loss that goes by what ``examples`` there are, where the run wants that."""
        return self

    def seeing(self, sight: Sight, folder: Path | None) -> "Task":
        """The task as one model sees its images, whose paths are relative to ``folder``; where it :attr:`sees` any."""
        return self

    @abstractmethod
    def score(self, output: Output) -> Score:
        """The held-out sums of a batch."""

    def scored(self, outputs: Iterable[Output]) -> Score:
        """The held-out sums of all batches."""
        return sum(map(self.score, outputs), Score())

    def figure(self, score: Score) -> float:
        """The task's metric, from summed scores: the share that is right."""
        return score.correct / score.count

    def merit(self, score: Score) -> float:
        """How good one unit's score is, from 0 to 1: what a private run sums under noise."""
        return self.figure(score)

    def score_of(self, merit: float, count: float) -> Score:
        """The score that merits of so much in sum stand for, over so many units."""
        return Score(loss=count - merit, correct=round(merit), count=round(count))

    def tally_sizes(self) -> Mapping[str, int]:
        """The tallies of a score, and how many numbers each has."""
        return {}

    def adds_up(self, score: Score) -> bool:
        """Whether the tallies of a score fit its count and what is right of it."""
        return True

    def figures(self, score: Score) -> dict[str, float]:
        """The metric, and after it whatever else the tallies of ``score`` say."""
        return {self.metric: self.figure(score)}

    def by_class(self, score: Score) -> dict[str, dict[str, float]]:
        """What the tallies say of each class, by its name: ``share`` of the examples, ``recall`` where it has any."""
        return {}

    def together(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples of a batch with what each has of the others."""
        return examples

    def labels(self, examples: Sequence[Example]) -> Tensor:
        """The labels of a batch of ``examples``, as :meth:`collate` has them beside it."""
        return self.targets(*_rows(self.together(examples)))

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        """Pad on the right to the longest; shapes ``N x T``, and N is :attr:`rows` times as many as ``examples``."""
        texts, longest = _rows(self.together(examples))
        tokens = torch.full((len(texts), longest), pad)
        mask, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for row, text in enumerate(texts):
            length = len(text.tokens)
            tokens[row, :length] = torch.tensor(text.tokens)
            mask[row, :length] = 1
            segments[row, : len(text.segments)] = torch.tensor(text.segments)
        told = {"token_type_ids": segments} if any(text.segments for text in texts) else {}
        return {"input_ids": tokens, "attention_mask": mask, "labels": self.targets(texts, longest)} | told

    def targets(self, texts: Sequence[Example], longest: int) -> Tensor:
        """The labels of a batch: ``N x T``, or what a head is to say, ``N`` or ``N x C``."""
        labels = torch.full((len(texts), longest), IGNORED)
        for row, text in enumerate(texts):
            labels[row, : len(text.labels)] = torch.tensor(text.labels)
        return labels

    def check(self, columns: Sequence[str], where: str) -> None:
        """Raise :class:`BouquetError` if a field that the task reads is not among ``columns``."""
        self.demand(self.fields(), columns, where)

    def demand(self, names: Sequence[str], columns: Sequence[str], where: str) -> None:
        """Raise :class:`BouquetError` if one of the ``names`` is not among ``columns``."""
        talks = CONVERSATIONS & set(columns) and not self.sees
        for name in names:
            if name not in columns:
                close = "Set task.name=chat for conversations." if talks else ""
                close = close or did_you_mean(name, columns)
                raise BouquetError(
                    "the task needs a field that the data lacks",
                    where=f"task '{self.config.name}', {where}",
                    expected=f"a field '{name}'",
                    got=f"the fields {', '.join(columns)}" if columns else "no record",
                    cure=f"{close} The task.* keys of the run config name the fields.".strip(),
                )


def _rows(examples: Sequence[Example]) -> tuple[list[Example], int]:
    """The texts that are a batch's rows, in their order, and the tokens of the longest."""
    rows = zip_longest(*(example.texts for example in examples))
    texts = [text for row in rows for text in row if text is not None]
    return texts, max(len(text.tokens) for text in texts)
