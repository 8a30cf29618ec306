"""What tasks share that learn from preferences: prompts, replies, and the base.

    r(x, y) = log p(y | x) - log p_base(y | x)        the reward is beta r

The base is the model with its adapter off, so that no second model is needed.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.error import BouquetError
from common.sources.fields import LeftOut, text, words
from common.tasks.fixed import fixed
from common.tasks.task import Example, Output, Task
from common.tasks.turns import Turn, asked, conversation, turn_of, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Turn]

UNIT, FURTHEST = 2**20, 2**11
"""Rewards are tallied in 2^-20, as far as 2^11 either way: of 2^31 texts they fit into 62 bits."""


class Preference(Task):
    """The prompt is a text or a list of turns, and so is a reply; replies that are whole conversations hold the prompt.

    The loss covers a reply and what ends it.
    """

    rows = 2
    compares = True
    metric = "reward-accuracy"
    further = "reward-margin"

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
        """A prompt, up to where the reply begins."""
        return Example(asked(text, tokenizer), [])

    def prompted(self, record: Mapping[str, Any], replies: Sequence[str]) -> tuple[Turns, list[Turns]]:
        """The prompt of a record, and the replies in the fields of these names.

        Raises :class:`LeftOut` where one of them says nothing, :class:`BouquetError` where there is no prompt.
        """
        found = [self._reply(record, field) for field in replies]
        if all(reply[0]["role"] == "assistant" for reply in found):
            return self._prompt(record, replies), found
        # Every reply goes on from where they are one conversation; a single one from its last turn.
        ends = [reply[:-1] for reply in found]
        pairs = takewhile(lambda turns: all(turn == turns[0] for turn in turns), zip(*ends, strict=False))
        if not (prompt := [turns[0] for turns in pairs]):
            raise self._without_prompt(replies)
        return prompt, [reply[len(prompt) :] for reply in found]

    def reply(
        self, record: Mapping[str, Any], prompt: Turns, reply: Turns, tokenizer: "PreTrainedTokenizerBase"
    ) -> Example:
        """A prompt and the reply to it, which alone is learned. Raises as :func:`conversation` does."""
        tools = unpacked(record.get("tools"), "tools") or None
        return conversation([*prompt, *reply], tokenizer, self.length, tools, first=len(prompt))[-1]

    def _reply(self, record: Mapping[str, Any], field: str) -> Turns:
        value = record.get(field)
        if not isinstance(value, list):
            return [{"role": "assistant", "content": text(record, field, "answer")}]
        if not value:
            raise LeftOut("answer")
        return [turn_of(turn, field) for turn in value]

    def _prompt(self, record: Mapping[str, Any], replies: Sequence[str]) -> Turns:
        field = self.config.prompt
        if field not in record:
            raise self._without_prompt(replies)
        if isinstance(value := record[field], list):
            if not value:
                raise LeftOut("text")
            return [turn_of(turn, field) for turn in value]
        question = text(record, field)
        if context := words(record.get(self.config.context), self.config.context):
            question += f"\n\n{context}"
        return [{"role": "user", "content": question}]

    def _without_prompt(self, replies: Sequence[str]) -> BouquetError:
        return BouquetError(
            "a reply without a prompt",
            where=f"field '{self.config.prompt}'",
            expected=f"a prompt, or conversations in {' and '.join(replies)} that begin with the same one",
            got="neither",
            cure="Name the field of the prompt with task.prompt.",
        )

    def ratios(self, output: Output) -> Tensor:
        """What r is of every row of a batch: 2 N values."""
        if output.reference is None:
            raise ValueError("preferences are learned against the base, whose values are missing")
        # Values are losses: the logarithm of a probability with the other sign.
        return output.reference().float().sum(1) - output.values.float().sum(1)

    def weights(self, labels: Tensor) -> Tensor:
        return torch.ones(len(labels) // self.rows, device=labels.device)


def tally(rewards: Tensor) -> tuple[int, int]:
    """The sums of what is above zero and of what is below, in 2^-20: a tally has no sign."""
    held = fixed(rewards.clamp(-FURTHEST, FURTHEST), UNIT)
    return int(held.clamp(min=0).sum()), int((-held).clamp(min=0).sum())


def possible(above: int, below: int, count: int) -> bool:
    """Whether so many rewards may have these sums."""
    return above + below <= count * FURTHEST * UNIT


def summed(above: int, below: int) -> float:
    """The sum of the rewards that were tallied."""
    return (above - below) / UNIT
