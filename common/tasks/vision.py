"""Images and what is asked about them: only the answers are predicted and scored.

An image stands where its mark does: ``<image>`` in what a user says, as LLaVA's data sets write it, or a part of a turn
that is one. Without marks all stand before the user's first words. The model's own mark is no word of a record's: it
would let one text take what was seen for another.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config.run import TaskConfig
from common.error import BouquetError
from common.sources.fields import text, words
from common.sources.images import ImageFile, images, made_up
from common.tasks.chat import FIELDS
from common.tasks.instruct import Instruct
from common.tasks.sight import Sight
from common.tasks.task import CONVERSATIONS, IGNORED, Batch, Example
from common.tasks.turns import (
    IMAGE,
    Read,
    Turn,
    asked,
    fitted,
    readings,
    text_part,
    turn_of,
    unpacked,
    writes_images,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "<image>"
"""What stands in a record's text for an image, whatever the model's own mark is."""


class Vision(Instruct):
    """One image or several with a prompt and an answer, or with a conversation about them.

    An image takes as many tokens as the model sees of it, which are never cut: a record whose images and prompt leave
    no room for an answer is left out.
    """

    name = "vision"

    sees = True

    def __init__(self, config: TaskConfig, sight: Sight | None = None, folder: Path | None = None) -> None:
        super().__init__(config)
        self._sight, self._folder = sight, folder

    def seeing(self, sight: Sight, folder: Path | None) -> "Vision":
        return Vision(self.config, sight, folder)

    def fields(self) -> list[str]:
        return [self.config.image, *super().fields()]

    def check(self, columns: Sequence[str], where: str) -> None:
        talks = CONVERSATIONS & set(columns)
        self.demand([self.config.image] if talks else self.fields(), columns, where)

    def encode(self, record: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
        seen = images(record.get(self.config.image), self.config.image, self._folder)
        turns = self._turns(record, len(seen))
        shown = [{**turn, "content": self._shown(turn["content"], tokenizer)} for turn in turns]
        read = readings(shown, tokenizer, unpacked(record.get("tools"), "tools") or None)
        last = max((place for place, turn in enumerate(turns) if _answers(turn)), default=0)
        self._check_written(read, sum(turn["content"].count(MARK) for turn in turns[:last]), len(seen))
        examples = fitted([self._filled(each, seen) for each in read], self.length)
        return [self._with_images(example, seen) for example in examples]

    def ask(self, text: str, tokenizer: "PreTrainedTokenizerBase", seen: Sequence[ImageFile] = ()) -> Example:
        """A question about the images that are ``seen``, or about none, up to where the answer begins."""
        (turn,) = self._marked([{"role": "user", "content": text}], len(seen))
        question = asked(self._shown(turn["content"], tokenizer), tokenizer)
        read = question, [False] * len(question)
        self._check_written([read], len(seen), len(seen))
        tokens, _ = self._filled(read, seen)
        return Example(tokens, [], images=tuple(seen))

    def made_up(self, tokens: list[int], number: int) -> Example:
        """With an image of noise, where there is room for one and an answer."""
        if self._sight is None:
            return super().made_up(tokens, number)
        others = [token - (token == self._sight.token) for token in tokens]
        image = made_up(number)
        places = list(self._sight.tokens(image.size))
        if len(others) < len(places) + 2:
            return super().made_up(others, number)
        head, tail = [others[0], *places], others[1 + len(places) :]
        return Example([*head, *tail], [*[IGNORED] * len(head), *tail], images=(image,))

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        """As any text, and beside it what the model's processor makes of the images."""
        batch = super().collate(examples, pad)
        seen = [image for example in examples for image in example.images]
        return batch | self._sight.inputs(seen, batch["input_ids"]) if self._sight is not None else batch

    def written(self, text: str, prompt: str, draw: random.Random) -> Mapping[str, Any]:
        return {**super().written(text, prompt, draw), **dict.fromkeys(CONVERSATIONS)}

    @property
    def _eyes(self) -> Sight:
        if self._sight is None:
            raise ValueError("an image task without a model that takes images")
        return self._sight

    def _turns(self, record: Mapping[str, Any], count: int) -> list[Turn]:
        """The turns of a record with a mark for each of its ``count`` images."""
        if field := next((name for name in FIELDS if record.get(name)), ""):
            told = [turn_of(_in_one(turn), field) for turn in unpacked(record[field], field)]
        else:
            question, answer = text(record, self.config.prompt), text(record, self.config.answer, "answer")
            if context := words(record.get(self.config.context), self.config.context):
                question += f"\n\n{context}"
            told = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._marked(told, count)

    def _marked(self, turns: list[Turn], count: int) -> list[Turn]:
        """The turns with a mark for each of ``count`` images. Raises :class:`BouquetError` for other marks."""
        for turn in turns:
            for mark in {MARK, self._eyes.mark} - ({MARK} if turn["role"] == "user" else set()):
                if mark in turn["content"]:
                    raise BouquetError(
                        "an image placeholder where none is allowed",
                        expected=f"only {MARK}, and only in the user's turns",
                        got=f"{mark} in a turn of the {turn['role']}",
                    )
        own = [turn for turn in turns if turn["role"] == "user"]
        marks = sum(turn["content"].count(MARK) for turn in own)
        if not marks and own and count:
            first = next(place for place, turn in enumerate(turns) if turn["role"] == "user")
            return [
                {**turn, "content": MARK * count + turn["content"]} if place == first else turn
                for place, turn in enumerate(turns)
            ]
        if marks != count:
            raise BouquetError(
                "the numbers of images and placeholders differ",
                expected=f"as many {MARK} in the user's turns as images, or none",
                got=f"{marks} for {count}",
            )
        return turns

    def _shown(self, said: str, tokenizer: "PreTrainedTokenizerBase") -> Any:
        """What is said as the model's template takes it: parts, or a text with the model's own marks."""
        pieces = [piece.strip("\n") for piece in said.split(MARK)]
        if writes_images(tokenizer, self._eyes.mark):
            return list(_parts(pieces))
        return "".join([pieces[0], *(f"{self._eyes.mark}\n{piece}" for piece in pieces[1:])])

    def _check_written(self, read: Sequence[Read], least: int, most: int) -> None:
        """Raise :class:`BouquetError` unless the template has written the images, from ``least`` to ``most`` marks."""
        got = max(len(self._places(tokens)) for tokens, _ in read)
        if not least <= got <= most:
            raise BouquetError(
                "the model's chat template does not render the images of a conversation",
                expected=f"{self._eyes.mark} for each of {least}",
                got=str(got),
                cure="Choose a model whose template does, or give its tokenizer one.",
            )

    def _filled(self, read: Read, seen: Sequence[ImageFile]) -> Read:
        """What was read, with the tokens of each image in the place of its mark."""
        tokens, learned = read
        # What was read may end before the last images.
        for place, image in reversed(list(zip(self._places(tokens), seen, strict=False))):
            own = list(self._eyes.tokens(image.size))
            tokens = [*tokens[:place], *own, *tokens[place + 1 :]]
            learned = [*learned[:place], *[False] * len(own), *learned[place + 1 :]]
        return tokens, learned

    def _with_images(self, example: Example, seen: Sequence[ImageFile]) -> Example:
        """An example with those of its images that have not been cut off; none is cut in two, as none is learned."""
        ends = accumulate(list(self._eyes.tokens(image.size)).count(self._eyes.token) for image in seen)
        left = len(self._places(example.tokens))
        return example._replace(images=tuple(image for image, end in zip(seen, ends, strict=True) if end <= left))

    def _places(self, tokens: Sequence[int]) -> list[int]:
        return [place for place, token in enumerate(tokens) if token == self._eyes.token]


def _in_one(turn: Any) -> Any:
    """A turn whose parts, texts and images, are one text, with a mark for each image; any other as it is."""
    said = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(said, list) or not all(isinstance(part, dict) for part in said):
        return turn
    if {part.get("type") for part in said} - {"image", "text"}:
        return turn
    return {**turn, "content": "".join(MARK if part["type"] == "image" else str(part.get("text")) for part in said)}


def _answers(turn: Turn) -> bool:
    return turn["role"] == "assistant" and bool(str(turn["content"]).strip() or turn.get("tool_calls"))


def _parts(pieces: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Texts and the images between them."""
    for number, piece in enumerate(pieces):
        if number:
            yield IMAGE
        if piece:
            yield text_part(piece)
