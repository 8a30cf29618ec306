"""The section ``task`` of a run's config."""

import math
from typing import Annotated, Literal

from pydantic import Field

from common.config.ranges import Only, Positive
from common.config.section import Section


class TaskConfig(Section):
    """What is learned, and which fields of an example hold it."""

    name: str = "text"
    """What is learned."""
    max_length: Annotated[int, Only(lambda length: not length or length >= 4, "0, or 4 or more")] = 0
    """The most tokens in an example; 0 follows the model and, outside private runs, the node's data."""
    text: str = "text"
    """The field that holds the text."""
    text_pair: str = ""
    """The field that holds the second text of a pair; empty where there is only one text."""
    label: str = "label"
    """The field that holds the label: a class, several classes, a number, or whether a reply is desirable."""
    labels: Annotated[int, Field(ge=2)] = 2
    """The number of classes, where they are numbers."""
    classes: str = ""
    """The names of the classes, separated by commas; empty where they are numbers."""
    class_weights: str = "none"
    """How classes are weighted in the loss: `none`, `balanced` by each node's counts, or a number for each class."""
    separator: str = ","
    """What separates several labels in one text."""
    range: str = "0,1"
    """The lowest and the highest number that may be predicted, separated by a comma."""
    head: Literal["shared", "local", "frozen"] = "shared"
    """Whether a classification head is averaged, stays with each node, or is not trained."""
    prompt: str = "instruction"
    """The field that holds the instruction."""
    image: str = "image"
    """The field that holds the image that the instruction is about, or a list of images."""
    context: str = "input"
    """The field that holds further input to the instruction, where a record has one."""
    answer: str = "output"
    """The field that holds the answer, the only part that is learned."""
    chosen: str = "chosen"
    """The field that holds the better of two replies."""
    rejected: str = "rejected"
    """The field that holds the worse of two replies."""
    beta: Positive = 0.1
    """How strongly preferences keep the model close to its base: beta of DPO and KTO."""
    desirable_weight: Positive = 1.0
    """The weight of a desirable reply in the loss of KTO."""
    undesirable_weight: Positive = 1.0
    """The weight of an undesirable reply in the loss of KTO."""
    anchor: str = "anchor"
    """The field that holds the text used to find another."""
    positive: str = "positive"
    """The field that holds the text that the anchor should find."""
    negative: str = "negative"
    """The field that holds a text that the anchor should not find, where a record has one."""
    negatives: Literal["batch", "own"] = "batch"
    """What an anchor is contrasted with: everything in its `batch` but its positive, or its record's `own` negative."""
    scale: Positive = 20.0
    """What cosine similarities are multiplied by in the loss of embeddings: the inverse of its temperature."""

    @property
    def names(self) -> list[str]:
        """The names of the classes, in their order; none where the classes are numbers."""
        return [name.strip() for name in self.classes.split(",")] if self.classes.strip() else []

    @property
    def weights(self) -> list[float]:
        """The weight of each class in the loss; none where all are alike or each node has its own."""
        named = self.class_weights in ("none", "balanced")
        return [] if named else [float(weight) for weight in self.class_weights.split(",")]

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the most that a number may be. Raises ``ValueError`` where the text is no range."""
        least, most = (float(bound) for bound in self.range.split(","))
        if not -math.inf < least < most < math.inf:
            raise ValueError(self.range)
        return least, most

    def contradictions(self) -> list[str]:
        """What is wrong with the classes and the range."""
        mistakes, names = [], self.names
        try:
            _ = self.bounds
        except ValueError:
            mistakes.append(
                f"task.range: expected two numbers separated by a comma, the lower first, got {self.range!r}"
            )
        if not self.separator.strip():
            mistakes.append(f"task.separator: expected a comma or another separator, got {self.separator!r}")
        if names and (len(set(names)) < len(names) or not all(names) or len(names) < 2):
            mistakes.append(
                f"task.classes: expected two or more different names, separated by commas, got {self.classes!r}"
            )
        if names and self.labels not in (len(names), TaskConfig().labels):
            mistakes.append(
                f"task.labels: expected {len(names)}, the number of names in task.classes, got {self.labels}"
            )
        try:
            weights = self.weights
        except ValueError:
            weights = [math.nan]
        number = len(names) or self.labels
        if weights and not (len(weights) == number and all(0 <= weight < math.inf for weight in weights)):
            wanted = f"'none', 'balanced', or {number} numbers of 0 or more, separated by commas"
            mistakes.append(f"task.class-weights: expected {wanted}, got {self.class_weights!r}")
        return mistakes
