"""Instructions: only the answer is predicted and scored."""

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.sources.fields import text, words
from common.tasks.score import Score
from common.tasks.task import IGNORED, Example, Output
from common.tasks.text import Text
from common.tasks.turns import asked, conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Instruct(Text):
    """Prompt and answer, in the tokenizer's chat template where it has one, else in a plain one.

    The loss covers the answer and what ends it. A pair longer than ``max_length`` loses the end of its answer; one
    whose prompt leaves no room for an answer is left out.
    """

    name = "instruct"

    windows = False
    further = "exact-match"

    def tally_sizes(self) -> Mapping[str, int]:
        """How many answers are right to the last token, and how many answers there are."""
        return {"exact": 2}

    def score(self, output: Output) -> Score:
        score = super().score(output)
        if output.right is None:
            return score
        right = (output.right | (output.labels == IGNORED))[:, 1:].all(1)
        return score + Score(tallies={"exact": (int(right.sum()), len(right))})

    def adds_up(self, score: Score) -> bool:
        """No more right answers than answers, each of a token or more."""
        right, answers = score.tallies.get("exact", (0, 0))
        return right <= answers <= score.count

    def figures(self, score: Score) -> dict[str, float]:
        """Perplexity, and exact match: the share of answers that greedy decoding gives, with their end.

        No answer is decoded for it: if every token is the likeliest after the right ones before it, then decoding
        goes that way.
        """
        found = super().figures(score)
        if "exact" in score.tallies:
            right, answers = score.tallies["exact"]
            found[self.further] = right / max(1, answers)
        return found

    def fields(self) -> list[str]:
        return [self.config.prompt, self.config.answer]

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        question, answer = text(record, self.config.prompt), text(record, self.config.answer, "answer")
        if context := words(record.get(self.config.context), self.config.context):
            question += f"\n\n{context}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return conversation(turns, tokenizer, self.length)

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        return {self.config.prompt: prompt, self.config.context: "", self.config.answer: text}

    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        """The answer to another prompt."""
        return {self.config.answer: other.get(self.config.answer)}

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """An instruction, up to where the answer begins."""
        return Example(asked(text, tokenizer), [])
