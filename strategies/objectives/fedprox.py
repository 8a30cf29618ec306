"""FedProx: Li et al., *Federated Optimization in Heterogeneous Networks*, arXiv:1812.06127, equation 2.

loss + mu / 2 |w - w_received|^2
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from common.method import option
from strategies.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class FedProx(Objective):
    """Pulls the node back to where the round started."""

    mu: float = option(0.01, gt=0, le=1000)
    """The weight of the pull towards where the round started."""

    name = "fedprox"
    paper = "arXiv:1812.06127"

    def add(self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]) -> None:
        for parameter, start in zip(parameters, received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.mu)
