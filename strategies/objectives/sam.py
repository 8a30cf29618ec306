"""SAM: gradients from a little uphill, which lead to flatter minima.

Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, arXiv:2010.01412 (ICLR 2021).

    g1 = grad(w)        g = grad(w + radius g1 / |g1|)

In a federation of unlike nodes each node's flat minimum is nearer to the others' (Qu et al., *FedSAM*,
arXiv:2206.02618). Two gradients a step are two releases, so a private run is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from common.method import option
from strategies.objectives.objective import Figures, Objective, uphill


@dataclass(frozen=True, kw_only=True)
class Sam(Objective):
    """The gradient a little uphill in the place of the own one."""

    radius: float = option(0.05, gt=0, le=1000)
    """How far uphill the gradient is taken, in the norm of all parameters."""

    name = "sam"
    paper = "arXiv:2010.01412"
    passes = 2

    def gradients(self, compute: Callable[[], Figures], parameters: Sequence[nn.Parameter]) -> Figures:
        return uphill(compute, parameters, self.radius)
