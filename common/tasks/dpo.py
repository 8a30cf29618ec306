"""Direct preference optimisation: the better of two replies becomes more likely.

Rafailov et al., *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*, arXiv:2305.18290.

    L = -log sigmoid(beta (r(x, y_chosen) - r(x, y_rejected)))        r(x, y) = log p(y | x) - log p_base(y | x)
"""

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from common.tasks.preference import Preference, possible, summed, tally
from common.tasks.score import Score
from common.tasks.task import IGNORED, Example, Output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Dpo(Preference):
    """A prompt with a better and a worse reply; a pair is one example, and in a private run one record."""

    name = "dpo"

    def fields(self) -> list[str]:
        return [self.config.chosen, self.config.rejected]

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        prompt, replies = self.prompted(record, self.fields())
        chosen, rejected = (self.reply(record, prompt, reply, tokenizer) for reply in replies)
        return [chosen._replace(cut=chosen.cut or rejected.cut, against=rejected)]

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        own = {self.config.prompt: prompt, self.config.context: ""}
        return {**own, self.config.chosen: text, self.config.rejected: prompt}

    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        """The worse reply in the place of the better one."""
        chosen, rejected = self.fields()
        return {chosen: record.get(rejected), rejected: record.get(chosen)}

    def made_up(self, tokens: list[int], number: int) -> Example:
        prompt, reply = [IGNORED] * 2, tokens[2:]
        other = [*reply[1:], *reply[:1]]
        return Example(tokens, prompt + reply, against=Example(tokens[:2] + other, prompt + other))

    def _margins(self, output: Output) -> Tensor:
        """By how much the better reply of each pair has the higher reward."""
        chosen, rejected = self.ratios(output).chunk(2)
        return self.config.beta * (chosen - rejected)

    def sums(self, output: Output) -> Tensor:
        return -logsigmoid(self._margins(output))

    def score(self, output: Output) -> Score:
        margins = self._margins(output)
        loss, right = -logsigmoid(margins).sum().item(), int((margins > 0).sum())
        return Score(loss, right, len(margins), {"margin": tally(margins)})

    def tally_sizes(self) -> Mapping[str, int]:
        """The margins that are above zero and those below, summed apart, in 2^-20."""
        return {"margin": 2}

    def adds_up(self, score: Score) -> bool:
        above, below = score.tallies["margin"]
        return possible(above, 0, score.correct) and possible(0, below, score.count - score.correct)

    def figures(self, score: Score) -> dict[str, float]:
        """The share of pairs whose better reply has the higher reward, and by how much on average."""
        found = super().figures(score)
        if "margin" in score.tallies:
            found[self.further] = summed(*score.tallies["margin"]) / score.count
        return found
