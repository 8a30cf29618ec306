"""FedSpeed: a proximal term whose bias is corrected, and gradients from a little uphill.

Sun et al., *FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy*,
arXiv:2302.10429 (ICLR 2023), algorithm 1. With h the node's own correction, zero at first,

    g1 = grad(w)        g2 = grad(w + radius g1 / |g1|)        g = ascent g2 + (1 - ascent) g1
    w <- w - rate (g + pull (w - w_received + h))
    after the round     h <- h + w - w_received        sent for the mean: w + h

In the paper's letters h is -lambda g-hat, and ``pull`` is 1 / lambda. Because the correction h leaves with w, the mean
of the nodes is where their corrected objectives meet: on quadratics it is the common optimum, which FedProx misses.
Where only some of the nodes are asked it diverges, and such a run is refused. Two gradients a step are two releases, so
a private run is refused, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from common.method import option
from strategies.objectives.objective import Figures, Objective, uphill


@dataclass(frozen=True, kw_only=True)
class FedSpeed(Objective):
    """A proximal term with a memory, and an extra step uphill."""

    pull: float = option(0.1, gt=0, le=1000)
    """The weight of the pull towards where the round started, 1 / lambda in the paper."""
    radius: float = option(0.05, ge=0, le=1000)
    """How far uphill the second gradient is taken, in the norm of all parameters; 0 for none."""
    ascent: float = option(1.0, ge=0, le=1)
    """The share of the uphill gradient in a step; 0 for none."""

    name = "fedspeed"
    paper = "arXiv:2302.10429"
    remembers = True
    passes = 2

    def gradients(self, compute: Callable[[], Figures], parameters: Sequence[nn.Parameter]) -> Figures:
        return uphill(compute, parameters, self.radius, self.ascent)

    def add(self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]) -> None:
        for parameter, start, correction in zip(parameters, received, remembered, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start + correction, alpha=self.pull)

    def remember(
        self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]
    ) -> list[Tensor]:
        moved = zip(parameters, received, remembered, strict=True)
        return [correction + parameter.detach() - start for parameter, start, correction in moved]

    def sent(self, trained: Tensor, remembered: Tensor) -> Tensor:
        return trained + remembered
