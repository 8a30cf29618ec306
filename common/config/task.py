"""The section ``task`` of a run's config."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from common.config.section import Section


def _zero_or_four(length: int) -> int:
    if length and length < 4:
        raise PydanticCustomError("length", "0, or 4 or more")
    return length


class TaskConfig(Section):
    """What is learned, and which fields of an example hold it.

    ``max_length`` = 0 goes by the model and, outside private runs, by the node's data (``common/models/lengths.py``).
    ``classes`` are the names of the classes, with commas; without them the classes are numbers. ``class_weights`` is
    ``none``, ``balanced`` (each node by its own counts), or a number a class, with commas.
    """

    name: str = "text"
    max_length: Annotated[int, AfterValidator(_zero_or_four)] = 0
    text: str = "text"
    text_pair: str = ""
    label: str = "label"
    labels: Annotated[int, Field(ge=2)] = 2
    classes: str = ""
    class_weights: str = "none"
    head: Literal["shared", "local", "frozen"] = "shared"
    prompt: str = "instruction"
    context: str = "input"
    answer: str = "output"

    @property
    def names(self) -> list[str]:
        """The names of the classes, in their order; none where the classes are numbers."""
        return [name.strip() for name in self.classes.split(",")] if self.classes.strip() else []

    @property
    def weights(self) -> list[float]:
        """The weight of each class in the loss; none where all are alike or each node has its own."""
        named = self.class_weights in ("none", "balanced")
        return [] if named else [float(weight) for weight in self.class_weights.split(",")]

    def contradictions(self) -> list[str]:
        """What is wrong with the classes."""
        mistakes, names = [], self.names
        if names and (len(set(names)) < len(names) or not all(names) or len(names) < 2):
            mistakes.append(f"task.classes: expected two or more different names, with commas, got {self.classes!r}")
        if names and self.labels not in (len(names), TaskConfig().labels):
            mistakes.append(f"task.labels: expected {len(names)}, as many as task.classes has, got {self.labels}")
        try:
            weights = self.weights
        except ValueError:
            weights = [math.nan]
        number = len(names) or self.labels
        if weights and not (len(weights) == number and all(0 <= weight < math.inf for weight in weights)):
            wanted = f"'none', 'balanced', or {number} numbers from 0, with commas"
            mistakes.append(f"task.class-weights: expected {wanted}, got {self.class_weights!r}")
        return mistakes
