"""FedProx: Li et al., *Federated Optimization in Heterogeneous Networks*, arXiv:1812.06127, equation 2.

loss + mu / 2 |w - w_received|^2
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from strategies.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class FedProx(Objective):
    """Pulls the node back to where the round started."""

    mu: float = 0.01

    name = "fedprox"
    paper = "arXiv:1812.06127"

    def __post_init__(self) -> None:
        self._demand("mu", 0 < self.mu <= 1000, "more than 0, at most 1000")

    def add(self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]) -> None:
        for parameter, start in zip(parameters, received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.mu)
