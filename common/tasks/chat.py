"""Conversations: only the assistant's turns are predicted and scored."""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.sources.fields import LeftOut
from common.tasks.instruct import Instruct
from common.tasks.task import Example
from common.tasks.turns import conversation, turn_of, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("messages", "conversations")


class Chat(Instruct):
    """A record's ``messages`` (``role``, ``content``) or ``conversations`` (``from``, ``value``), and its ``tools``."""

    name = "chat"

    def fields(self) -> list[str]:
        return [FIELDS[0]]

    def check(self, columns: Sequence[str], where: str) -> None:
        if not set(FIELDS) & set(columns):
            super().check(columns, where)

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        field = next((name for name in FIELDS if record.get(name)), FIELDS[0])
        if not (written := unpacked(record.get(field), field)):
            raise LeftOut("text")
        tools = unpacked(record.get("tools"), "tools")
        return conversation([turn_of(turn, field) for turn in written], tokenizer, self.length, tools or None)

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        return {FIELDS[0]: [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}

    def mislabelled(
        self, record: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random
    ) -> Mapping[str, Any]:
        """The last turn of another conversation."""
        own, others = (list(each.get(FIELDS[0]) or ()) for each in (record, other))
        return {FIELDS[0]: [*own[:-1], *others[-1:]]}
