"""Instruction tuning: the answer is predicted from the prompt, and only the answer is scored."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from common.tasks.task import IGNORED, Example, Score, token_ids
from common.tasks.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "### Instruction:\n{prompt}\n\n### Response:\n"


class Instruct(Text):
    """Prompt and answer, in the tokenizer's chat template where it has one, else in a plain one.

    The loss covers the answer and the token that ends it. A pair longer than ``max_length`` loses the end of its
    answer; one whose prompt leaves no room for an answer is left out.
    """

    further = "exact-match"

    def tally_sizes(self) -> Mapping[str, int]:
        """How many answers are right to the last token, and how many answers there are."""
        return {"exact": 2}

    def score(self, logits: Tensor, labels: Tensor) -> Score:
        # It takes seconds to import, and only scoring needs it.
        from torchmetrics.functional.classification import multiclass_exact_match

        right = multiclass_exact_match(
            logits[:, :-1].argmax(-1),
            labels[:, 1:],
            logits.shape[-1],
            multidim_average="samplewise",
            ignore_index=IGNORED,
            validate_args=False,
        )
        return super().score(logits, labels) + Score(tallies={"exact": (int(right.sum()), len(right))})

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

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Iterable[Example]:
        context = record.get(self.config.context) or ""
        question = str(record[self.config.prompt]) + (f"\n\n{context}" if context else "")
        answer = str(record[self.config.answer] or "")
        head = self.ask(question, tokenizer).tokens
        tail = token_ids(tokenizer, answer, add_special_tokens=False)
        if tokenizer.eos_token_id is not None:
            tail = [*tail, tokenizer.eos_token_id]
        tokens = (head + tail)[: self.config.max_length]
        if answer and len(tokens) > len(head):
            yield Example(tokens, [IGNORED] * len(head) + tokens[len(head) :])

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """An instruction, up to where the answer begins."""
        prompt = self.prompt(text, tokenizer)
        tokens = token_ids(tokenizer, prompt, add_special_tokens=tokenizer.chat_template is None)
        return Example(tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens, [])

    @staticmethod
    def prompt(question: str, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The text that stands before the answer."""
        if tokenizer.chat_template is None:
            return PLAIN.format(prompt=question)
        turns = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
