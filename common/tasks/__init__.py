"""What a model learns, one task per file, and the list of them."""

from collections.abc import Mapping

from common.config.run import TaskConfig
from common.tasks.chat import Chat
from common.tasks.classify import Classify
from common.tasks.dpo import Dpo
from common.tasks.embed import Embed
from common.tasks.encoding import encoded
from common.tasks.instruct import Instruct
from common.tasks.kto import Kto
from common.tasks.multi_label import MultiLabel
from common.tasks.regress import Regress
from common.tasks.score import Score
from common.tasks.task import Batch, Example, Output, Task
from common.tasks.text import Text
from common.tasks.vision import Vision

TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (Text, Instruct, Chat, Vision, Classify, MultiLabel, Regress, Dpo, Kto, Embed)
}


def build(config: TaskConfig) -> Task:
    """The task that the config names."""
    return TASKS[config.name](config)


def classes(config: TaskConfig) -> int | None:
    """How many numbers the model's head says of a text, one a class.

    0 for a language model, None for one that has neither head nor words: a text's vector is all that is wanted.
    """
    return TASKS[config.name].outputs(config)


__all__ = ["TASKS", "Batch", "Example", "Output", "Score", "Task", "build", "classes", "encoded"]
