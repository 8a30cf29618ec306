"""Kahneman-Tversky optimisation: from replies that are each desirable or not, without pairs.

Ethayarajh et al., *KTO: Model Alignment as Prospect Theoretic Optimization*, arXiv:2402.01306, equation 7.

    L = w_D (1 - sigmoid(beta (r(x, y) - z)))   of a desirable reply        r(x, y) = log p(y | x) - log p_base(y | x)
    L = w_U (1 - sigmoid(beta (z - r(x, y))))   of an undesirable one       z = max(0, mean of r(x_i, y_(i-1)))

z estimates how far the model has moved from its base, over prompts with the replies to others: those of the batch,
turned by one. No gradient goes through it, and yet every example's loss depends on its companions.
"""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.error import BouquetError
from common.sources.fields import LeftOut, words
from common.tasks.classes import label
from common.tasks.preference import Preference, possible, summed, tally
from common.tasks.score import Score
from common.tasks.task import IGNORED, Example, Output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands in the place of the first token's label, which nothing comes before that could predict it.
DESIRABLE, UNDESIRABLE = -1, -2
SAYS = {"true": DESIRABLE, "1": DESIRABLE, "false": UNDESIRABLE, "0": UNDESIRABLE}


class Kto(Preference):
    """A prompt and a reply, and whether that is desirable."""

    name = "kto"

    apart = False

    def fields(self) -> list[str]:
        return [self.config.answer, self.config.label]

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        if not (said := words(record.get(self.config.label), self.config.label)):
            raise LeftOut("label")
        if (side := SAYS.get(label(said))) is None:
            raise BouquetError(
                "a label that is neither true nor false",
                where=f"field '{self.config.label}'",
                expected="true or 1 for a desirable reply, false or 0 otherwise",
                got=repr(said)[:80],
            )
        prompt, (reply,) = self.prompted(record, [self.config.answer])
        example = self.reply(record, prompt, reply, tokenizer)
        return [example._replace(labels=[side, *example.labels[1:]])]

    def told(self, example: Example) -> Sequence[str]:
        return ["desirable" if example.labels[0] == DESIRABLE else "undesirable"]

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        own = {self.config.prompt: prompt, self.config.context: "", self.config.answer: text}
        return {**own, self.config.label: draw.choice([True, False])}

    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        desirable = SAYS.get(label(str(record.get(self.config.label)))) == DESIRABLE
        return {self.config.label: not desirable}

    def made_up(self, tokens: list[int], number: int) -> Example:
        side = UNDESIRABLE if number % 2 else DESIRABLE
        return Example(tokens, [side, IGNORED, *tokens[2:]])

    def together(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Against each example stands its prompt with the reply to the one before it."""
        replies = [*examples[-1:], *examples[:-1]]
        pairs = zip(examples, replies, strict=True)
        return [one._replace(against=self._mismatched(one, other)) for one, other in pairs]

    def _mismatched(self, prompt: Example, reply: Example) -> Example:
        """The prompt of one example with the reply of another, as far as it fits."""
        head, start = _reply_at(prompt), _reply_at(reply)
        tokens = [*prompt.tokens[:head], *reply.tokens[start:]][: self.length]
        return Example(tokens, [IGNORED] * head + tokens[head:])

    def _advantages(self, output: Output) -> Tensor:
        """What beta (r - z) is of each example, with the other sign where it is undesirable."""
        ratios, mismatched = self.ratios(output).chunk(2)
        moved = mismatched.detach().mean().clamp(min=0)
        return torch.where(self._desirable(output), 1.0, -1.0) * self.config.beta * (ratios - moved)

    def _desirable(self, output: Output) -> Tensor:
        return output.labels[: len(output.labels) // self.rows, 0] == DESIRABLE

    def sums(self, output: Output) -> Tensor:
        desirable, undesirable = self.config.desirable_weight, self.config.undesirable_weight
        weights = torch.where(self._desirable(output), desirable, undesirable)
        return weights * (1 - self._advantages(output).sigmoid())

    def score(self, output: Output) -> Score:
        """Right is a desirable reply above z, and an undesirable one below it."""
        losses, right = self.sums(output), self._advantages(output) > 0
        rewards, desirable = self.config.beta * self.ratios(output).chunk(2)[0], self._desirable(output)
        tallies = {
            name: (int(own.sum()), *tally(rewards[own]))
            for name, own in (("desirable", desirable), ("undesirable", ~desirable))
        }
        return Score(losses.sum().item(), int(right.sum()), len(losses), tallies)

    def tally_sizes(self) -> Mapping[str, int]:
        """How many replies there are, and their rewards above zero and below, summed apart, in 2^-20."""
        return {"desirable": 3, "undesirable": 3}

    def adds_up(self, score: Score) -> bool:
        counts = [score.tallies[name] for name in ("desirable", "undesirable")]
        each = all(possible(above, below, count) for count, above, below in counts)
        return each and sum(count for count, *_ in counts) == score.count

    def figures(self, score: Score) -> dict[str, float]:
        """The share that is right, and the mean reward of desirable replies less that of the others."""
        found = super().figures(score)
        sides = [score.tallies.get(name, (0, 0, 0)) for name in ("desirable", "undesirable")]
        if all(count for count, *_ in sides):
            means = [summed(above, below) / count for count, above, below in sides]
            found[self.further] = means[0] - means[1]
        return found


def _reply_at(example: Example) -> int:
    """Where the reply begins: at the first token that is learned."""
    return next(place for place, each in enumerate(example.labels) if place and each != IGNORED)
