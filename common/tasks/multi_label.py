"""Several labels for a text: for each class, whether it applies.

    L_i = 1/C sum_c BCE(z_ic, y_ic)        a class is said where z_ic > 0

F1 is 2 TP / (2 TP + FP + FN): micro over all classes together, macro the mean over the classes that occur.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from common.error import BouquetError
from common.sources.fields import LeftOut, words
from common.tasks.classes import label
from common.tasks.headed import Classed
from common.tasks.score import Score
from common.tasks.task import Example, Output

HITS, FALSE_ALARMS, MISSES = "hits", "false-alarms", "misses"


class MultiLabel(Classed):
    """Labels are a list of classes, one text with ``task.separator`` between them, or a 0 or 1 for each class.

    An empty list, or in JSON an empty text, says none of the classes; a blank cell of a table is no label.
    ``task.class-weights`` say what a class that is there weighs against one that is not.
    """

    name = "multi-label"

    metric = "micro-f1"
    further = "macro-f1"

    def named(self, record: Mapping[str, Any]) -> Sequence[str]:
        given = self._given(record)
        return [] if given is None or _is_flags(given, len(given)) else [label(self._word(each)) for each in given]

    def told(self, example: Example) -> Sequence[str]:
        return [name for name, there in zip(self.classes, example.labels, strict=True) if there]

    def readings(self, values: Tensor) -> Mapping[str, float]:
        """The probability of each class, whatever that of the others."""
        return dict(zip(self.classes, values.float().sigmoid().tolist(), strict=True))

    def read(self, record: Mapping[str, Any]) -> Sequence[int]:
        if (given := self._given(record)) is None:
            raise LeftOut("label")
        if _is_flags(given, len(self.classes)):
            return [int(each) for each in given]
        found = [self._classes.number(self._word(each), each) for each in given]
        if len(set(found)) < len(found):
            raise BouquetError(
                "a label occurs twice",
                where=f"field '{self.config.label}'",
                expected=f"each class once, or a 0 or 1 for each of {len(self.classes)}",
                got=repr(given)[:80],
                cure="Name all classes with task.classes, or set task.labels to their number.",
            )
        return [int(number in found) for number in range(len(self.classes))]

    def _given(self, record: Mapping[str, Any]) -> Sequence[Any] | None:
        """What stands in the record's field, label by label; None where nothing is said."""
        value = record.get(self.config.label)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = _as_list(value)
        if isinstance(value, list | tuple):
            return value
        said = words(value, self.config.label)
        if not said:
            return [] if isinstance(value, str) else None
        return [each for each in said.split(self.config.separator) if each.strip()]

    def _word(self, value: Any) -> str:
        if not (said := words(value, self.config.label)):
            raise BouquetError("an empty label", where=f"field '{self.config.label}'", got=repr(value))
        return said

    def any_label(self, draw: random.Random) -> list[str]:
        return draw.sample(self.classes, draw.randint(0, len(self.classes)))

    def wrong_label(self, record: Mapping[str, Any], draw: random.Random) -> list[str]:
        """All classes that are not there."""
        there = self.read(record)
        return [name for name, own in zip(self.classes, there, strict=True) if not own]

    def weighed(self, examples: Sequence[Example]) -> "MultiLabel":
        """The task in which a class that is there weighs as much as the times that it is not."""
        if self.config.class_weights != "balanced":
            return self
        there = torch.tensor([list(example.labels) for example in examples], dtype=torch.float32).sum(0)
        balanced = type(self)(self.config)
        balanced._weights = torch.where(there > 0, (len(examples) - there) / there.clamp(min=1), 1.0)
        return balanced

    def made_up(self, tokens: list[int], number: int) -> Example:
        chosen = number % len(self.classes)
        return Example(tokens, [int(other == chosen) for other in range(len(self.classes))])

    def sums(self, output: Output) -> Tensor:
        return self._losses(output, self._weights.to(output.labels.device))

    def weights(self, labels: Tensor) -> Tensor:
        return torch.ones(len(labels), device=labels.device)

    def _losses(self, output: Output, weights: Tensor | None) -> Tensor:
        values = output.values.float()
        return binary_cross_entropy_with_logits(values, output.labels, pos_weight=weights, reduction="none").mean(1)

    def score(self, output: Output) -> Score:
        """The unweighted loss, whatever the classes weigh in training."""
        there, said = output.labels > 0, output.values > 0
        counts = {HITS: there & said, FALSE_ALARMS: said & ~there, MISSES: there & ~said}
        tallies = {name: tuple(each.sum(0).tolist()) for name, each in counts.items()}
        right = int((there == said).all(1).sum())
        return Score(self._losses(output, None).sum().item(), right, len(there), tallies)

    def figure(self, score: Score) -> float:
        """Micro-F1; what noised merits say of it, where there are no tallies."""
        if not score.tallies:
            return super().figure(score)
        return _f1(*(sum(score.tallies[name]) for name in (HITS, FALSE_ALARMS, MISSES)))

    def tally_sizes(self) -> Mapping[str, int]:
        """Of each class how often it was said rightly, said wrongly, and not said."""
        return dict.fromkeys((HITS, FALSE_ALARMS, MISSES), len(self.classes))

    def adds_up(self, score: Score) -> bool:
        """No class comes more often than there are texts, or is wrong in one of those that are all right."""
        wrong = score.count - score.correct
        classes = list(zip(*(score.tallies[name] for name in (HITS, FALSE_ALARMS, MISSES)), strict=True))
        within = all(
            hits + false + missed <= score.count and false + missed <= wrong for hits, false, missed in classes
        )
        return within and wrong <= sum(false + missed for _, false, missed in classes)

    def figures(self, score: Score) -> dict[str, float]:
        """Micro-F1, and macro-F1 over the classes that occur, in the labels or in what is said."""
        found = super().figures(score)
        classes = zip(*(score.tallies.get(name, ()) for name in (HITS, FALSE_ALARMS, MISSES)), strict=True)
        if each := [_f1(*counts) for counts in classes if any(counts)]:
            found[self.further] = sum(each) / len(each)
        return found

    def by_class(self, score: Score) -> dict[str, dict[str, float]]:
        found = {}
        for name, hits, missed in zip(
            self.classes, score.tallies.get(HITS, ()), score.tallies.get(MISSES, ()), strict=bool(score.tallies)
        ):
            recall = {"recall": hits / (hits + missed)} if hits + missed else {}
            found[name] = {"share": (hits + missed) / max(1, score.count), **recall}
        return found


def _f1(hits: int, false_alarms: int, misses: int) -> float:
    """1 where there is nothing to find, and nothing was found."""
    whole = 2 * hits + false_alarms + misses
    return 2 * hits / whole if whole else 1.0


def _is_flags(given: Sequence[Any], classes: int) -> bool:
    """Whether there is a 0 or 1, true or false, for each of so many classes."""
    numbers = all(isinstance(each, int | float) and each in (0, 1) for each in given)
    return bool(given) and numbers and len(given) == classes


def _as_list(value: str) -> Any:
    """A list that a table holds as JSON; the text itself where it is none."""
    try:
        return json.loads(value)
    except ValueError:
        return value
