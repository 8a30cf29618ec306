"""From records to examples, and what becomes of each."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.error import BouquetError
from common.sources.counts import Counts
from common.sources.fields import LeftOut
from common.sources.records import Placed, broken, content
from common.tasks.task import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encoded(
    task: Task, found: Iterable[Placed], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[list[Example]], Counts]:
    """The examples in each record, none in one that is left out, and what became of the records.

    Raises :class:`BouquetError` with the first that are broken.
    """
    examples: list[list[Example]] = []
    left_out: Counter[str] = Counter()
    faults = []
    for placed in found:
        examples.append([])
        try:
            examples[-1] = task.encode(content(placed), tokenizer)
        except LeftOut as reason:
            left_out[reason.reason] += 1
        except BouquetError as error:
            faults.append(Placed(placed.where, error))
    if faults:
        raise broken(faults, len(examples), where=f"task '{task.config.name}'")
    cut = sum(example.cut for own in examples for example in own[:1])
    return examples, Counts(len(examples), left_out, cut, sum(map(len, examples)), task.length)
