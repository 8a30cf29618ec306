"""The contract of a mean: how the nodes' tensors become one set of tensors."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.adapter.values import State, Tensors
from common.method import Method

Updates = Iterable[tuple[float, Tensors]]
"""The weight and the tensors of each node."""

Memory = Mapping[str, Tensors]
"""What the server keeps from round to round, by name; it never travels."""


@dataclass(frozen=True, kw_only=True)
class Mean(Method):
    """A function from the nodes' weights and tensors to one set of tensors."""

    section = "mean"

    @abstractmethod
    def __call__(self, state: State, updates: Updates) -> tuple[Tensors, Memory]:
        """The mean of ``updates``, of which there is at least one, and what it adds to the state's memory."""
