"""How many tokens an example may have: where the run leaves it open (``task.max-length`` = 0).

A text is read in windows of a quarter of the model's positions, 512 at most: more context at once costs memory and
time, and nothing of the text is lost. Whatever has to fit as a whole gets what 99 of 100 of the node's own records
need, within the model's positions and 2048 tokens. In a private run no record may decide it, and it is the model's
positions, 512 at most.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import tasks
from common.config.run import ModelConfig, RunConfig, TaskConfig
from common.error import BouquetError
from common.models import base, sight
from common.sources.counts import Counts
from common.sources.records import Placed, fields
from common.tasks import TASKS, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST, SHORT = 2048, 512
SHARE = 0.99
STEP = 8
"""Tokens that a length is rounded up to: what graphics cards multiply best."""


def bounded(task: TaskConfig, model: ModelConfig, *, private: bool) -> TaskConfig:
    """The task with the most tokens that an example may have, whatever the data.

    Raises :class:`BouquetError` where that is more than the model has positions for.
    """
    positions = base.positions(model)
    if task.max_length and positions and task.max_length > positions:
        raise BouquetError(
            "task.max-length exceeds the model's positions",
            where=f"model.name = '{model.name}'",
            expected=f"at most {positions}",
            got=str(task.max_length),
            cure="Lower it, or leave it at 0, which follows the model.",
        )
    if task.max_length:
        return task
    if TASKS[task.name].windows:
        most = min((positions or LONGEST) // 4, SHORT)
    else:
        most = min(positions or SHORT, SHORT) if private else min(positions or LONGEST, LONGEST)
    return task.model_copy(update={"max_length": most})


def widest(config: RunConfig, source: str = "") -> Task:
    """The task of a run over a ``source`` of data, with the most tokens that an example may have."""
    return built(bounded(config.task, config.model, private=config.privacy.on), config.model, source)


def built(task: TaskConfig, model: ModelConfig, source: str = "") -> Task:
    """The task over a ``source`` of data, as the model sees its images if it has any."""
    return sight.seeing(tasks.build(task), model, source)


def fitted(
    task: TaskConfig, model: ModelConfig, found: Sequence[Placed], tokenizer: "PreTrainedTokenizerBase", source: str
) -> Task:
    """The task of a plain run over a ``source`` of data, with the length that its records need."""
    widest = built(bounded(task, model, private=False), model, source)
    if task.max_length or widest.windows:
        return widest
    encoded, _ = tasks.encoded(widest, found, tokenizer)
    lengths = sorted(example.length for record in encoded for example in record)
    if not lengths:
        return widest
    needed = lengths[min(len(lengths) - 1, int(SHARE * len(lengths)))]
    rounded = min(widest.length, max(STEP, -(-needed // STEP) * STEP))
    return built(task.model_copy(update={"max_length": rounded}), model, source)


def encoded(
    task: TaskConfig, model: ModelConfig, found: Sequence[Placed], source: str
) -> tuple[Task, list[list[Example]], Counts]:
    """Records of a ``source`` as a plain run takes them: their task, the examples of each, and their counts.

    Raises :class:`BouquetError` where they lack a field that the task reads, and as :func:`common.tasks.encoded` does.
    """
    tokenizer = base.load_tokenizer(model)
    tasks.build(task).check(fields(found), where=source)
    kind = fitted(task, model, found, tokenizer, source)
    return kind, *tasks.encoded(kind, found, tokenizer)
