"""From records to examples, and what becomes of each."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from common.config.run import TaskConfig
from common.error import BouquetError
from common.sources.counts import Counts
from common.sources.fields import LeftOut
from common.sources.records import Placed, Record, broken, content
from common.tasks.task import Example, Task
from common.tasks.tokenized import tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = 100_000
"""Of how many records a process keeps what a tokenizer has made of them for one task."""


def encoded(
    task: Task, found: Iterable[Placed], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[list[Example]], Counts]:
    """The examples in each record, none in one that is left out, and what became of the records.

    A record that this process has had before is not tokenised again, in whatever run, node and file it comes.

    Raises :class:`BouquetError` with the first that are broken.
    """
    examples: list[list[Example]] = []
    left_out: Counter[str] = Counter()
    faults = []
    for placed in found:
        examples.append([])
        try:
            examples[-1] = _encoded(task, content(placed), tokenizer)
        except LeftOut as reason:
            left_out[reason.reason] += 1
        except BouquetError as error:
            faults.append(Placed(placed.where, error))
    if faults:
        raise broken(faults, len(examples), where=f"task '{task.config.name}'")
    cut = sum(example.cut for own in examples for example in own[:1])
    return examples, Counts(len(examples), left_out, cut, sum(map(len, examples)), task.length)


def whole(text: str, tokenizer: "PreTrainedTokenizerBase", length: int, pair: str | None = None) -> Example:
    """A text, or a pair of texts, as the tokenizer writes it, cut at ``length`` tokens; without labels."""
    encoded = tokenized(tokenizer, text, pair, verbose=False)
    if cut := len(encoded["input_ids"]) > length:
        encoded = tokenized(tokenizer, text, pair, truncation=True, max_length=length)
    return Example(encoded["input_ids"], [], encoded.get("token_type_ids", ()), cut)


def _encoded(task: Task, record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """The examples in a record. Raises :class:`LeftOut` and :class:`BouquetError` as :meth:`Task.encode` does."""
    if task.sees:  # a path says not what is in the file
        return task.encode(record, tokenizer)
    try:
        key = hashlib.sha256(json.dumps(record).encode()).digest()
    except (TypeError, ValueError):  # a value that has no text, such as an image
        return task.encode(record, tokenizer)
    known = _known(task.config, tokenizer)
    if (found := known.get(key)) is None:
        try:
            found = task.encode(record, tokenizer)
        except LeftOut as reason:
            found = reason.reason
        if len(known) < KEPT:
            known[key] = found
    if isinstance(found, str):
        raise LeftOut(found)
    return found


@lru_cache(maxsize=2)
def _known(task: TaskConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[bytes, list[Example] | str]:
    """The examples in records, or why one is left out, by what stands in them.

    Of two tasks: before a length is fitted to the records, they are tokenised at the largest.
    """
    return {}
