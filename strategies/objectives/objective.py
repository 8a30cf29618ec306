"""The contract of a node's objective: what its loss has beside the loss of its examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from common.adapter.values import Tensors
from common.method import Method

Figures = tuple[float, int]
"""The loss of a step, and its tokens."""


@dataclass(frozen=True, kw_only=True)
class Objective(Method):
    """Further terms of the loss, as changes of its gradients; and what a node remembers for them between rounds.

    Lists hold one tensor for each trained parameter, in one order. ``received`` is where the round started,
    ``remembered`` what :meth:`remember` gave in the node's last round; what :meth:`first` gives before that.
    """

    section = "objective"
    remembers: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    """How often a step computes gradients; in a private run each would be a release of its own."""
    over: ClassVar[bool] = False
    """Whether the adapter that a run starts from stays as it is, under factors of the run's own."""
    compares: ClassVar[bool] = False
    """Whether it holds what it remembers to what comes next, which then has to be the mean of what was trained."""

    def gradients(self, compute: Callable[[], Figures], parameters: Sequence[nn.Parameter]) -> Figures:
        """Leave a step's gradients in the parameters, by ``compute``, and return its figures."""
        return compute()

    def add(self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]) -> None:
        """Add the gradients of the further terms."""
        return

    def earlier(self, offset: Tensors) -> Tensors:
        """What :meth:`penalty` needs of the offset that a round trains over, worked out once a round."""
        return {}

    def penalty(self, trained: Tensors, earlier: Tensors) -> Tensor | None:
        """A term of the loss that is differentiated by itself, from the tensors that are trained; None for most."""
        return None

    def first(self, start: Tensor) -> Tensor:
        """What is remembered of a tensor before the node's first round, from where that starts."""
        return torch.zeros_like(start)

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


def uphill(
    compute: Callable[[], Figures], parameters: Sequence[nn.Parameter], radius: float, ascent: float = 1.0
) -> Figures:
    """Leave gradients taken ``radius`` uphill from where the parameters are, along the gradient of all of them.

    They are a share of ``ascent`` of what is left; the others are those where the parameters are.
    """
    figures = compute()
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    first = [_gradient(parameter).clone() for parameter in trained]
    length = torch.stack(_norms(first)).norm() if first else torch.zeros(())
    if not (radius and ascent and length > 0):
        return figures
    before = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter, gradient in zip(trained, first, strict=True):
            parameter.add_(gradient * (radius / length).to(gradient.device))
            parameter.grad = None
    _, again = compute()
    with torch.no_grad():
        for parameter, start, gradient in zip(trained, before, first, strict=True):
            parameter.copy_(start)
            _gradient(parameter).mul_(ascent).add_(gradient, alpha=1 - ascent)
    return figures[0], figures[1] + again


def _norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, all on the device of the first: of a model that is split they lie on several."""
    return [gradient.norm().to(gradients[0].device) for gradient in gradients]


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter without a gradient where it had one")
    return parameter.grad
