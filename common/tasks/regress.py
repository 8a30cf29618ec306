"""A number for a text, or for a pair of texts: similarity, a grade, a price.

    L_i = (z_i - u_i)^2        u = (y - least) / (most - least), from 0 to 1

What is said beyond the range counts as its end when it is scored.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.config.run import TaskConfig
from common.error import BouquetError
from common.sources.fields import LeftOut, words
from common.tasks.fixed import fixed
from common.tasks.headed import Headed
from common.tasks.score import Score
from common.tasks.task import Example, Output

UNIT = 2**30
"""Tallies are in 2^-30: of 2^31 texts they fit into 62 bits."""
SLACK = 1e-6
"""How far a mean squared error may be from what the tallies say, which are rounded."""


class Regress(Headed):
    """Labels are numbers in ``task.range``."""

    name = "regress"

    metric = "rmse"
    rises = False
    further = "pearson-r"

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self._least, self._most = config.bounds

    @classmethod
    def outputs(cls, config: TaskConfig) -> int:
        return 1

    @property
    def _span(self) -> float:
        return self._most - self._least

    def told(self, example: Example) -> Sequence[str]:
        return [f"{self._least + self._span * share:g}" for share in example.labels]

    def facts(self) -> Mapping[str, str]:
        return {"labels": f"from {self._least:g} to {self._most:g}, which the head outputs as 0 and 1"}

    def readings(self, values: Tensor) -> Mapping[str, float]:
        """The number, in its own unit."""
        return {self.config.label: self._least + self._span * float(values.float().clamp(0, 1)[0])}

    def read(self, record: Mapping[str, Any]) -> Sequence[float]:
        if not (said := words(record.get(self.config.label), self.config.label)):
            raise LeftOut("label")
        try:
            number = float(said)
        except ValueError:
            number = math.nan
        if not self._least <= number <= self._most:
            raise BouquetError(
                "a label is out of range",
                where=f"field '{self.config.label}'",
                expected=f"a number from {self._least:g} to {self._most:g}",
                got=repr(record[self.config.label])[:80],
                cure="Set task.range to the lowest and the highest label, such as '0,5'.",
            )
        return [(number - self._least) / self._span]

    def any_label(self, draw: random.Random) -> float:
        return draw.uniform(self._least, self._most)

    def wrong_label(self, record: Mapping[str, Any], draw: random.Random) -> float:
        """The end of the range that is further away."""
        (share,) = self.read(record)
        return self._least if share > 0.5 else self._most

    def made_up(self, tokens: list[int], number: int) -> Example:
        return Example(tokens, [float(number % 2)])

    def sums(self, output: Output) -> Tensor:
        return (output.values.float()[:, 0] - output.labels).square()

    def weights(self, labels: Tensor) -> Tensor:
        return torch.ones(len(labels), device=labels.device)

    def score(self, output: Output) -> Score:
        said, true = output.values.double()[:, 0].clamp(0, 1), output.labels.double()
        x, y = fixed(said, UNIT), fixed(true, UNIT)
        moments = (x, y, *(one * other // UNIT for one, other in ((x, x), (x, y), (y, y))))
        tally = tuple(int(each.sum()) for each in moments)
        return Score(loss=(said - true).square().sum().item(), count=len(true), tallies={"moments": tally})

    def figure(self, score: Score) -> float:
        """The root of the mean squared error, in the unit of the labels."""
        return self._span * math.sqrt(score.loss / score.count)

    def merit(self, score: Score) -> float:
        """One less the error, as a share of the range."""
        return 1 - min(1.0, math.sqrt(score.loss / score.count)) if score.count else 0.0

    def score_of(self, merit: float, count: float) -> Score:
        return Score(loss=count * (1 - merit / count) ** 2, count=round(count))

    def tally_sizes(self) -> Mapping[str, int]:
        """Sums of what is said x, what is true y, x^2, x y and y^2, in 2^-30."""
        return {"moments": 5}

    def adds_up(self, score: Score) -> bool:
        """The sums are those of numbers from 0 to 1, and their squared error is the loss."""
        x, y, xx, xy, yy = score.tallies["moments"]
        n, unit = score.count, UNIT
        # Each product was rounded down by less than one.
        within = xx <= x <= n * unit and yy <= y <= n * unit and xy <= min(x, y)
        spread = x * x <= n * (xx + n) * unit and y * y <= n * (yy + n) * unit and xy**2 <= (xx + n) * (yy + n)
        error = (xx - 2 * xy + yy) / unit
        return score.correct == 0 and within and spread and abs(error - score.loss) <= SLACK * n

    def figures(self, score: Score) -> dict[str, float]:
        """The error, and Pearson's r where neither what is said nor what is true is one number alone."""
        found = super().figures(score)
        if "moments" in score.tallies:
            x, y, xx, xy, yy = score.tallies["moments"]
            n, unit = score.count, UNIT
            # Whole numbers, in which nothing cancels.
            variances = (n * xx * unit - x * x, n * yy * unit - y * y)
            if min(variances) > SLACK**2 * (n * unit) ** 2:
                r = (n * xy * unit - x * y) / math.sqrt(variances[0]) / math.sqrt(variances[1])
                found[self.further] = min(1.0, max(-1.0, r))
        return found
