"""FLoRIST: the stack of FLoRA, cut to the singular directions that hold a share of its energy.

Ramesh and Dass, *FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models*, arXiv:2506.09199 (MLSys 2026).

    U S Vh = svd(sum_k p_k s_k B_k A_k)      p = the fewest directions with  sum_{i <= p} S_i^2 >= energy * sum_i S_i^2
    W_0 <- W_0 + U_p S_p Vh_p                then A fresh, B = 0

Exact at ``energy = 1``, when it is FLoRA with a thinner offset. The SVD is taken through two QRs and a small core.
"""

from dataclasses import dataclass

from torch import Tensor

from common.adapter.algebra import directions_holding, low_rank_svd
from common.method import option
from strategies.rules.stack import RestartRule, Stack


@dataclass(frozen=True, kw_only=True)
class FLoRIST(RestartRule):
    """The leading directions join the offset; the nodes start again from A fresh and B = 0."""

    energy: float = option(0.95, gt=0, le=1)
    """The share of the squared singular values that is kept; 1 keeps all of them, which is exact."""

    name = "florist"
    paper = "arXiv:2506.09199"

    @property
    def exact(self) -> bool:
        """Where no direction is cut."""
        return self.energy == 1 and self.offset_energy == 1

    def kept(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """The leading directions."""
        u, singular, vh = low_rank_svd(stack.left.double(), stack.right.double())
        kept = directions_holding(self.energy, singular)
        return (u * singular)[:, :kept].float(), vh[:kept].float()
