"""Conversations, of which only the assistant's turns are predicted and scored."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.error import BouquetError
from common.sources.fields import LeftOut, words
from common.tasks.instruct import Instruct
from common.tasks.task import Example
from common.tasks.turns import Turn, conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Who speaks, by the names that data sets have for it.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
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
        if not (written := _unpacked(record.get(field), field)):
            raise LeftOut("text")
        tools = _unpacked(record.get("tools"), "tools")
        return conversation([_turn(turn, field) for turn in written], tokenizer, self.length, tools or None)


def _unpacked(value: Any, field: str) -> list[Any]:
    """A list, which a table holds as JSON. Raises :class:`BouquetError` on anything else."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    except ValueError:
        found = value
    if not isinstance(found, list):
        raise BouquetError(
            "a field is not a conversation",
            where=f"field '{field}'",
            expected="a list of objects with 'role' and 'content', or 'from' and 'value'",
            got=type(value).__name__,
        )
    return found


def _turn(turn: Any, field: str) -> Turn:
    """One turn, in the words of chat templates; what else it holds, such as calls of tools, is left to the template."""
    named = turn if isinstance(turn, dict) else {}
    who, said = named.get("role", named.get("from")), named.get("content", named.get("value"))
    if (role := ROLES.get(str(who).casefold())) is None:
        raise BouquetError(
            "a turn of nobody's",
            where=f"field '{field}'",
            expected=f"one of {', '.join(ROLES)} as its 'role' or 'from'",
            got=repr(who)[:80],
        )
    if isinstance(said, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in said):
        said = "".join(str(part.get("text")) for part in said)
    rest = {name: value for name, value in named.items() if name not in ("from", "value") and value is not None}
    return {**rest, "role": role, "content": words(said, field)}
