"""A step that a node's processes compute together: each computes a share of it, and what they compute is added up."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Share = Mapping[str, Any]
"""What of a step one process is to compute, in what JSON can say: examples and units by their numbers in the round."""

Item = TypeVar("Item")


class Sums(NamedTuple):
    """What was computed of a step: a gradient for each trained parameter, None where it has none, and figures."""

    gradients: Sequence[Tensor | None]
    figures: Sequence[float]


@dataclass(frozen=True)
class Work:
    """How a process computes a share of any step of a round, and for which parameters, in which order."""

    parameters: Sequence[Tensor]
    compute: Callable[[Share], Sums]

    def placed(self, gradients: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
        """The gradients that there are, by their parameters, each on that one's device."""
        found = zip(self.parameters, gradients, strict=True)
        return {parameter: gradient.to(parameter.device) for parameter, gradient in found if gradient is not None}


class Processes:
    """The processes that compute a step: this one alone, unless a subclass has others beside it."""

    number = 1

    def add_up(self, work: Work, shares: Sequence[Share]) -> Sums:
        """The sums over ``shares``, one for each process; the first is this one's own, computed by ``work``."""
        return work.compute(shares[0])


ALONE = Processes()


def deal(items: Sequence[Item], number: int) -> list[list[Item]]:
    """Items for each of so many processes, dealt out in turn; none for some, where there are fewer."""
    return [list(items[rank::number]) for rank in range(number)]


def deal_batches(batches: Sequence[Sequence[Item]], number: int, divisible: bool) -> list[list[Sequence[Item]]]:
    """A step's batches for each of so many processes: whole ones where those come out even, else a part of each.

    One that is not ``divisible`` (:attr:`Task.divisible`) stays whole.
    """
    if not divisible or len(batches) % number == 0:
        return [list(own) for own in deal(batches, number)]
    parts = [deal(batch, number) for batch in batches]
    return [[batch[rank] for batch in parts if batch[rank]] for rank in range(number)]
