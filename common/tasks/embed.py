"""Embeddings: texts that belong together move together, and apart from others.

InfoNCE over cosine similarities (van den Oord et al., *Representation Learning with Contrastive Predictive Coding*,
arXiv:1807.03748), with in-batch negatives the multiple-negatives ranking loss of Henderson et al., *Efficient Natural
Language Response Suggestion for Smart Reply*, arXiv:1705.00652, section 4.4:

    L_i = -log( exp(s a_i.p_i) / (exp(s a_i.p_i) + sum_c exp(s a_i.c)) )        a, p, c of length 1; s = task.scale

Under ``task.negatives = batch`` c runs over the positives of all other records of a batch and the negatives of all its
records. A text that is the anchor or its positive once more is no negative. Under ``own`` c is the record's negative
alone, and an example's loss does not depend on its companions.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.config.run import TaskConfig
from common.sources.fields import text, words
from common.tasks.encoding import whole
from common.tasks.fixed import fixed
from common.tasks.score import Score
from common.tasks.task import Example, Output, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR, POSITIVE, NEGATIVE = range(3)
"""What a row of a batch is, which its label says beside a number for its text."""

UNIT = 2**30
"""Reciprocal ranks are tallied in 2^-30: of 2^31 anchors they fit into 62 bits."""

CHUNK = 1024
"""Of how many held-out anchors the similarities to all candidates are there at once."""


class Embed(Task):
    """An anchor and its positive, and a negative where a record has one; held-out anchors look for their positives."""

    name = "embed"

    language = False
    rows = 3
    beside = ("positive", "negative")
    metric = "accuracy@1"
    further = "mrr"

    @classmethod
    def outputs(cls, config: TaskConfig) -> None:
        return None

    @property
    def _own(self) -> bool:
        """Whether an anchor has no negative but its record's."""
        return self.config.negatives == "own"

    @property
    def divisible(self) -> bool:
        return self._own

    def fields(self) -> list[str]:
        return [self.config.anchor, self.config.positive, *[self.config.negative] * self._own]

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        anchor, positive = text(record, self.config.anchor), text(record, self.config.positive, "positive")
        found, field = [anchor, positive], self.config.negative
        if negative := text(record, field, "negative") if self._own else words(record.get(field), field):
            found.append(negative)
        return [_joined([whole(each, tokenizer, self.length) for each in found])]

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        """The negative has the words of the positive in another order."""
        shuffled, config = text.split(), self.config
        draw.shuffle(shuffled)
        return {config.anchor: prompt, config.positive: text, config.negative: " ".join(shuffled)}

    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        """Another's positive in the place of its own, which becomes the negative."""
        field = self.config.positive
        return {field: other.get(field), self.config.negative: record.get(field)}

    def made_up(self, tokens: list[int], number: int) -> Example:
        return _joined([Example(each, []) for each in (tokens, tokens[1:], tokens[len(tokens) // 2 :])])

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """The text by itself."""
        return whole(text, tokenizer, self.length)

    def targets(self, texts: Sequence[Example], longest: int) -> Tensor:
        """``N x 2``: what a row is, and a number that equal texts share."""
        return torch.tensor([[*text.labels, hash(tuple(text.tokens))] for text in texts])

    def weights(self, labels: Tensor) -> Tensor:
        return torch.ones(int((labels[:, 0] == ANCHOR).sum()), device=labels.device)

    def sums(self, output: Output) -> Tensor:
        return _losses(self._similarities(output, slice(None)))

    def _similarities(self, output: Output, chosen: slice) -> Tensor:
        """Of the ``chosen`` anchors to their candidates, ``n x (1 + M)``: times the scale, the own positive first.

        What is no negative of an anchor lies at minus infinity.
        """
        kind, number = output.labels.T
        anchors, positives, negatives = (output.values[kind == each] for each in (ANCHOR, POSITIVE, NEGATIVE))
        own = (anchors * positives).sum(1, keepdim=True)[chosen]
        if self._own:
            others = (anchors * negatives).sum(1, keepdim=True)[chosen]
        else:
            others = anchors[chosen] @ torch.cat([positives, negatives]).T
            texts = torch.cat([number[kind == POSITIVE], number[kind == NEGATIVE]])
            same = [texts == number[kind == each][chosen, None] for each in (ANCHOR, POSITIVE)]
            others = others.masked_fill(same[0] | same[1], -torch.inf)
        return self.config.scale * torch.cat([own, others], 1)

    def scored(self, outputs: Iterable[Output]) -> Score:
        """All batches at once: an anchor looks for its positive among all that is held out, in whatever batch."""
        parts = [(output.values, output.labels) for output in outputs]
        if not parts:
            return Score()
        values, labels = zip(*parts, strict=True)
        return self.score(Output(torch.cat(values), torch.cat(labels)))

    def score(self, output: Output) -> Score:
        """Right is an anchor to which no candidate lies as near as its own positive; a tie is not right."""
        score, count = Score(), len(self.weights(output.labels))
        for first in range(0, count, CHUNK):
            similarities = self._similarities(output, slice(first, first + CHUNK))
            # Counted by what is farther, so that what is no number is never right.
            farther = (similarities[:, 1:] < similarities[:, :1]).sum(1)
            ranks = similarities.shape[1] - farther
            tallies = {"ranks": (int(fixed(1 / ranks.double(), UNIT).sum()),)}
            score += Score(_losses(similarities).sum().item(), int((ranks == 1).sum()), len(ranks), tallies)
        return score

    def tally_sizes(self) -> Mapping[str, int]:
        """The reciprocal ranks of all positives, summed, in 2^-30."""
        return {"ranks": 1}

    def adds_up(self, score: Score) -> bool:
        """Those that are found first have rank 1, the others 2 or more."""
        (ranks,) = score.tallies["ranks"]
        return 0 <= ranks - score.correct * UNIT <= (score.count - score.correct) * UNIT // 2

    def figures(self, score: Score) -> dict[str, float]:
        """The share of anchors that find their positive first, and the mean reciprocal rank at which they find it."""
        found = super().figures(score)
        if "ranks" in score.tallies:
            found[self.further] = score.tallies["ranks"][0] / UNIT / score.count
        return found


def _joined(texts: Sequence[Example], kind: int = ANCHOR) -> Example:
    """One example of an anchor, a positive and perhaps a negative."""
    first, *others = texts
    against = _joined(others, kind + 1) if others else None
    return first._replace(labels=[kind], cut=any(each.cut for each in texts), against=against)


def _losses(similarities: Tensor) -> Tensor:
    """InfoNCE of anchors to whose candidates the own positive is the first."""
    return cross_entropy(similarities, similarities.new_zeros(len(similarities), dtype=torch.long), reduction="none")
