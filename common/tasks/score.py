"""Sums over held-out examples, from which a task's figures are computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """Sums over held-out examples; ``count`` is what ``loss`` is summed over (tokens or examples).

    ``tallies`` are whole numbers that add up over batches and nodes, for figures that are no mean of the nodes' own.
    """

    loss: float = 0.0
    correct: int = 0
    count: int = 0
    tallies: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __add__(self, other: "Score") -> "Score":
        tallies = dict(self.tallies)
        for name, values in other.tallies.items():
            before = tallies.get(name, (0,) * len(values))
            tallies[name] = tuple(a + b for a, b in zip(before, values, strict=True))
        return Score(self.loss + other.loss, self.correct + other.correct, self.count + other.count, tallies)
