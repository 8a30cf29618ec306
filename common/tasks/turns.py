"""Conversations as a model reads them: its chat template's text, of which the assistant's turns are learned.

What is learned of a turn is what the model has to write there: all that follows the generation prompt, through the mark
that ends the turn. A template that marks it itself (``{% generation %}``) is taken at its word; else the text before a
turn is compared with the text after it. Where a template changes earlier turns once another follows, as those do that
drop a model's thoughts, every turn of the assistant is an example of its own, with what comes before it.

What is said is a text, or a list of parts, texts and images, as templates of models that see images take it; of those
that take nothing else, a text becomes a part.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from common.error import BouquetError
from common.sources.fields import LeftOut, words
from common.tasks.task import IGNORED, Example
from common.tasks.tokenized import tokenized, tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, Any]
Span = tuple[int, int]
"""Where something begins and ends in a text, in characters."""
Read = tuple[list[int], list[bool]]
"""The tokens of a conversation, and which of them are learned."""

IMAGE = {"type": "image"}
"""A part that is an image."""

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

# For tokenizers that have no template of their own.
PLAIN = (
    "{% for turn in messages %}{{ '' if loop.first else '\n\n' }}"
    "{% if turn.role == 'assistant' %}{{ '### Response:\n' + turn.content + (eos_token or '') }}"
    "{% elif turn.role == 'user' %}{{ '### Instruction:\n' + turn.content }}"
    "{% else %}{{ turn.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
)


def unpacked(value: Any, field: str) -> list[Any]:
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


def turn_of(turn: Any, field: str) -> Turn:
    """One turn, in the words of chat templates; what else it holds, such as calls of tools, is left to the template."""
    named = turn if isinstance(turn, dict) else {}
    who, said = named.get("role", named.get("from")), named.get("content", named.get("value"))
    if (role := ROLES.get(str(who).casefold())) is None:
        raise BouquetError(
            "a turn with an unknown role",
            where=f"field '{field}'",
            expected=f"one of {', '.join(ROLES)} as its 'role' or 'from'",
            got=repr(who)[:80],
        )
    if isinstance(said, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in said):
        said = "".join(str(part.get("text")) for part in said)
    rest = {name: value for name, value in named.items() if name not in ("from", "value") and value is not None}
    return {**rest, "role": role, "content": words(said, field)}


def text_part(said: str) -> Mapping[str, str]:
    """A part that is a text."""
    return {"type": "text", "text": said}


def conversation(
    turns: Sequence[Turn],
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    tools: Sequence[Any] | None = None,
    first: int = 1,
) -> list[Example]:
    """The examples in a conversation, of at most ``length`` tokens: whole turns as far as they fit.

    Of the assistant's turns those are learned that stand at place ``first`` or later, counted from 0.

    Raises :class:`LeftOut` where nothing that is learned fits, :class:`BouquetError` where the model's
    template does not take these turns.
    """
    return fitted(readings(turns, tokenizer, tools, first), length)


def readings(
    turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] | None = None, first: int = 1
) -> list[Read]:
    """A conversation as it is read: once, or once a turn of the assistant's. Raises as :func:`conversation` does."""
    # A template's own marks do not say whose turn they are of.
    if first == 1 and "{% generation" in re.sub(r"\{%-?\s*", "{% ", tokenizer.chat_template or ""):
        wanted = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        with tokenizing():
            marked = _rendered(turns, tokenizer, tools, **wanted)
        return [(list(marked["input_ids"]), list(map(bool, marked["assistant_masks"])))]
    return [_read(text, spans, tokenizer) for text, spans in _texts(turns, tokenizer, tools, first)]


def fitted(read: Iterable[Read], length: int) -> list[Example]:
    """The examples in what was read, of at most ``length`` tokens. Raises :class:`LeftOut` where none fits."""
    examples = [example for tokens, learned in read if (example := _fitted(tokens, learned, length))]
    if not examples:
        raise LeftOut("room")
    return examples


def asked(question: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens of a question, a text or parts, up to where the answer begins."""
    turns = [{"role": "user", "content": question}]
    return _read(_rendered(turns, tokenizer, None, add_generation_prompt=True), (), tokenizer)[0]


def writes_images(tokenizer: "PreTrainedTokenizerBase", mark: str) -> bool:
    """Whether the model's template writes the ``mark`` of an image for a part that is one, and the text beside it."""
    written = _tried("an image", tokenizer, tokenizer.chat_template)
    return written.count(mark) == 1 and TRIED in written


def _in_parts_alone(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's template loses what is said where it is no list of parts."""
    text, part = (_tried(kind, tokenizer, tokenizer.chat_template) for kind in ("a text", "a part"))
    return TRIED not in text and TRIED in part


TRIED = "tried"
"""What is said to see what a template makes of it."""
FORMS: Mapping[str, Any] = {
    "a text": TRIED,
    "a part": [text_part(TRIED)],
    "an image": [IMAGE, text_part(TRIED)],
}


@lru_cache(maxsize=4 * len(FORMS))
def _tried(form: str, tokenizer: "PreTrainedTokenizerBase", template: str | None) -> str:
    """What the ``template`` writes where a user says something in a form; nothing where it does not take that."""
    try:
        return str(_applied([{"role": "user", "content": FORMS[form]}], tokenizer, None))
    except Exception:  # a boundary: a template is a program of somebody else's
        return ""


def _applied(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", tools: Any, **options: Any) -> Any:
    template = tokenizer.chat_template or PLAIN
    return tokenizer.apply_chat_template(
        [dict(turn) for turn in turns], tools=tools, chat_template=template, **{"tokenize": False, **options}
    )


def _rendered(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", tools: Any, **options: Any) -> Any:
    if _in_parts_alone(tokenizer):
        turns = [
            {**turn, "content": [text_part(said)] if said else []} if isinstance(said := turn["content"], str) else turn
            for turn in turns
        ]
    try:
        return _applied(turns, tokenizer, tools, **options)
    except Exception as error:  # a boundary: a template is a program of somebody else's
        raise BouquetError(
            "the model's chat template rejects a conversation",
            expected="turns with the roles and in the order that its template allows",
            got=f"{', '.join(str(turn['role']) for turn in turns)} ({error})",
        ) from error


def _texts(
    turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", tools: Any, first: int
) -> Iterator[tuple[str, Sequence[Span]]]:
    """The texts of a conversation, each with where it is learned: one, or one a turn of the assistant's."""
    learned = []
    # What nobody has asked for, a first turn of the assistant's, is read and not learned; nor is one that says nothing.
    said = [turn["role"] == "assistant" and (_content(turn) or turn.get("tool_calls")) for turn in turns]
    for place in [place for place, own in enumerate(said) if place >= first and own]:
        before, after = _around(turns[: place + 1], tokenizer, tools)
        end = _end(after, len(before), _content(turns[place]), tokenizer)
        text = after[:end] if end else after + (tokenizer.eos_token or "")
        learned.append((text, (len(before), len(text))))
    if not learned:
        raise LeftOut("answer")
    whole = learned[-1][0]
    if all(whole.startswith(text) for text, _ in learned):
        yield whole, [span for _, span in learned]
    else:
        yield from ((text, [span]) for text, span in learned)


def _around(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", tools: Any) -> tuple[str, str]:
    """The text that the last turn is written after, and the same with what is written."""
    *earlier, last = turns
    before = _rendered(earlier, tokenizer, tools, add_generation_prompt=True)
    after = _rendered(turns, tokenizer, tools)
    if after.startswith(before):
        return before, after
    # The prompt opens what a finished turn has no trace of, such as a thought: the model is taught what it is asked.
    place = after.rfind(_content(last)) if _content(last) else -1
    if place < 0:
        raise BouquetError(
            "the model's chat template changes the text before a turn",
            expected="the same text before the assistant's turn, with and without that turn",
            cure="Choose a model with another template, or give its tokenizer one.",
        )
    return before, before + after[place:]


def _content(turn: Turn) -> str:
    """The text that is said in a turn."""
    said = turn.get("content") or ""
    return (said if isinstance(said, str) else "".join(part.get("text", "") for part in said)).strip()


def _end(text: str, start: int, content: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Where the mark ends that ends a turn: the first special token after its content; 0 where there is none."""
    place = text.find(content, start)
    found = _special(tokenizer).search(text, place + len(content) if place >= 0 else start)
    return found.end() if found else 0


@lru_cache(maxsize=4)
def _special(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """What the tokenizer's special tokens look like in a text."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _read(text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """The tokens of a text, and which of them lie in the spans."""
    # A template writes the token that begins a text itself.
    plain = tokenizer.chat_template is None
    encoded = tokenized(tokenizer, text, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
    tokens, places = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while plain and tokens and places[-1][0] == places[-1][1]:  # what an encoder's tokenizer puts at the end
        del tokens[-1], places[-1]
    learned = [any(start <= place < end for start, end in spans) and place < after for place, after in places]
    return tokens, learned


def _fitted(tokens: list[int], learned: list[bool], length: int) -> Example | None:
    """An example of at most ``length`` tokens: whole turns, or of the first that does not fit its beginning."""
    cut = len(tokens) > length
    if cut:
        ends = [at for at, (one, other) in enumerate(pairwise([*learned, False]), start=1) if one and not other]
        most = max((end for end in ends if end <= length), default=length)
        tokens, learned = tokens[:most], learned[:most]
    if not any(learned):
        return None
    return Example(tokens, [token if own else IGNORED for token, own in zip(tokens, learned, strict=True)], cut=cut)
