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
    """Tokens of an example at most; 0 goes by the model and, outside private runs, by the node's data."""
    text: str = "text"
    """The field of the text."""
    text_pair: str = ""
    """The field of the second text of a pair; empty where there is one text."""
    label: str = "label"
    """The field of what is said of a text: its class, its classes or its number; of whether a reply is desirable."""
    labels: Annotated[int, Field(ge=2)] = 2
    """The number of classes, where they are numbers."""
    classes: str = ""
    """The names of the classes, with commas; empty where they are numbers."""
    class_weights: str = "none"
    """How classes weigh in the loss: `none`, `balanced` by each node's counts, or a number a class, with commas."""
    separator: str = ","
    """What stands between several labels that are one text."""
    range: str = "0,1"
    """The least and the most that a number to be predicted may be, with a comma."""
    head: Literal["shared", "local", "frozen"] = "shared"
    """Whether a classification head is averaged, stays with each node, or is not trained."""
    prompt: str = "instruction"
    """The field of the instruction."""
    image: str = "image"
    """The field of the image that the instruction is about, or of a list of them."""
    context: str = "input"
    """The field of what is added to the instruction, where a record has it."""
    answer: str = "output"
    """The field of the answer, which alone is learned."""
    chosen: str = "chosen"
    """The field of the better of two replies."""
    rejected: str = "rejected"
    """The field of the worse of two replies."""
    beta: Positive = 0.1
    """How closely a preference keeps the model to its base: beta of DPO and KTO."""
    desirable_weight: Positive = 1.0
    """What a desirable reply weighs in the loss of KTO."""
    undesirable_weight: Positive = 1.0
    """What an undesirable reply weighs in the loss of KTO."""
    anchor: str = "anchor"
    """The field of the text by which another is to be found."""
    positive: str = "positive"
    """The field of the text that is to be found by it."""
    negative: str = "negative"
    """The field of a text that is not to be found by it, where a record has it."""
    negatives: Literal["batch", "own"] = "batch"
    """What an anchor is told from: all that its `batch` holds beside its positive, or its record's `own` negative."""
    scale: Positive = 20.0
    """What cosine similarities are multiplied by in the loss of embeddings: one over its temperature."""

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
            mistakes.append(f"task.range: expected two numbers, the lesser first, with a comma, got {self.range!r}")
        if not self.separator.strip():
            mistakes.append(f"task.separator: expected a comma, or another mark, got {self.separator!r}")
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
