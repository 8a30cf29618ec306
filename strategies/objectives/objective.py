"""The contract of a node's objective: what its loss has beside the loss of its examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from common.method import Method

Figures = tuple[float, int]
"""The loss of a step, and its tokens."""


@dataclass(frozen=True, kw_only=True)
class Objective(Method):
    """Further terms of the loss, as changes of its gradients; and what a node remembers for them between rounds.

    Lists hold one tensor for each trained parameter, in one order. ``received`` is where the round started,
    ``remembered`` what :meth:`remember` gave in the node's last round; zeros before that.
    """

    section = "objective"
    remembers: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    """How often a step computes gradients; in a private run each would be a release of its own."""

    def gradients(self, compute: Callable[[], Figures], parameters: Sequence[nn.Parameter]) -> Figures:
        """Leave a step's gradients in the parameters, by ``compute``, and return its figures."""
        return compute()

    def add(self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]) -> None:
        """Add the gradients of the further terms."""
        return

    def remember(
        self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]
    ) -> list[Tensor]:
        """What the node keeps for its next round."""
        return list(remembered)

    def sent(self, trained: Tensor, remembered: Tensor) -> Tensor:
        """What leaves for the mean of one tensor, after the round."""
        return trained


@dataclass(frozen=True, kw_only=True)
class Plain(Objective):
    """The loss of the examples alone."""

    name = "none"
    paper = "none"
