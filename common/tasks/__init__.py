"""What a model is taught, one task a file, and the list of them."""

from collections.abc import Mapping

from common.config.run import TaskConfig
from common.tasks.chat import Chat
from common.tasks.classify import Classify
from common.tasks.encoding import encoded
from common.tasks.instruct import Instruct
from common.tasks.task import Batch, Example, Output, Score, Task
from common.tasks.text import Text

TASKS: Mapping[str, type[Task]] = {task.name: task for task in (Text, Instruct, Chat, Classify)}


def build(config: TaskConfig) -> Task:
    """The task that the config names."""
    return TASKS[config.name](config)


def classes(config: TaskConfig) -> int:
    """The classes that a model's head must tell apart; 0 for a language model."""
    return config.labels if TASKS[config.name].sequence_classification else 0


__all__ = ["TASKS", "Batch", "Example", "Output", "Score", "Task", "build", "classes", "encoded"]
