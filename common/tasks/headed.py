"""What tasks share in which a head predicts something about a text, or a pair of texts."""

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from common.config.run import TaskConfig
from common.error import BouquetError
from common.sources.fields import text
from common.tasks.classes import Classes
from common.tasks.encoding import whole
from common.tasks.task import IGNORED, Example, Output, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Headed(Task):
    """A text, or a text and a second one, with a label; the head is trained beside the adapter."""

    sequence_classification = True
    language = False
    label_type: ClassVar[torch.dtype] = torch.float32
    """What the labels of a batch are."""

    def fields(self) -> list[str]:
        return [field for field in (self.config.text, self.config.text_pair, self.config.label) if field]

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> Sequence[float]:
        """What the head is to say of a record. Raises as :meth:`encode` does."""

    @abstractmethod
    def any_label(self, draw: random.Random) -> Any:
        """A label as a record may have it."""

    @abstractmethod
    def wrong_label(self, record: Mapping[str, Any], draw: random.Random) -> Any:
        """A label that a record may have, and this one does not."""

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        labels = self.read(record)
        first = text(record, self.config.text)
        pair = text(record, self.config.text_pair) if self.config.text_pair else None
        return [whole(first, tokenizer, self.length, pair)._replace(labels=labels)]

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        pair = {self.config.text_pair: prompt} if self.config.text_pair else {}
        return {self.config.text: text, **pair, self.config.label: self.any_label(draw)}

    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        return {self.config.label: self.wrong_label(record, draw)}

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """The text; where the task is about pairs, two texts with a tab between them."""
        if not self.config.text_pair:
            return whole(text, tokenizer, self.length)
        first, tab, second = text.partition("\t")
        if not tab:
            raise BouquetError("one text where two are compared", expected="a tab between them", got=repr(text))
        return whole(first, tokenizer, self.length, second)

    def targets(self, texts: Sequence[Example], longest: int) -> Tensor:
        """``N`` for one label a text, else ``N x C``."""
        return torch.tensor([text.labels or [IGNORED] for text in texts], dtype=self.label_type).squeeze(1)

    def losses(self, output: Output) -> Tensor:
        return self.sums(output)


class Classed(Headed):
    """A text of one class or several, each with a weight in the loss."""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self._classes = Classes(config)
        self._weights = torch.tensor(config.weights or [1.0] * len(self.classes))

    @property
    def classes(self) -> Sequence[str]:
        return self._classes.names

    def facts(self) -> Mapping[str, str]:
        return self._classes.facts
