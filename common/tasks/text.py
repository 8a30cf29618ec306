"""Plain text: every token predicted from those before it."""

import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from common.sources.fields import LeftOut, text
from common.tasks.score import Score
from common.tasks.task import IGNORED, Example, Output, Task
from common.tasks.tokenized import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WORST = 10.0
"""The loss a token from which on a unit's merit is zero: that of a guess among 22,000 tokens."""


class Text(Task):
    """Causal language modelling; a long text becomes several examples of at most ``max_length`` tokens."""

    name = "text"

    windows = True
    metric = "perplexity"
    rises = False

    def fields(self) -> list[str]:
        return [self.config.text]

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        said = text(record, self.config.text)
        tokens = token_ids(tokenizer, said, add_special_tokens=False, verbose=False)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        room = self.length - len(start)
        windows = [start + tokens[first : first + room] for first in range(0, len(tokens), room)]
        if not (examples := [Example(window, window) for window in windows if len(window) > 1]):
            raise LeftOut("short")
        return examples

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        return {self.config.text: text}

    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        """The same words in another order."""
        words = str(record.get(self.config.text)).split()
        return {self.config.text: " ".join(draw.sample(words, len(words)))}

    def made_up(self, tokens: list[int], number: int) -> Example:
        # A prompt of two tokens, which is no shorter than any that an answer follows.
        return Example(tokens, [IGNORED] * 2 + tokens[2:])

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """The beginning of a text, to be continued."""
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return Example(start + token_ids(tokenizer, text, add_special_tokens=False), [])

    def sums(self, output: Output) -> Tensor:
        return output.values.sum(1)

    def weights(self, labels: Tensor) -> Tensor:
        """The labelled tokens; the first of a text, which nothing comes before, is not predicted."""
        return (labels[:, 1:] != IGNORED).sum(1)

    def score(self, output: Output) -> Score:
        return Score(loss=self.sums(output).sum().item(), count=int(self.weights(output.labels).sum()))

    def figure(self, score: Score) -> float:
        """Perplexity: the exponential of the mean loss a token."""
        return math.exp(min(score.loss / score.count, 700.0))

    def merit(self, score: Score) -> float:
        """One less the share of :data:`WORST` that a token's mean loss is."""
        return 1 - min(score.loss / score.count, WORST) / WORST if score.count else 0.0

    def score_of(self, merit: float, count: float) -> Score:
        return Score(loss=WORST * (count - merit), count=round(count))
