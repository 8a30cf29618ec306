"""FLoRIST: the stack of FLoRA, cut to the singular directions that hold a share of its energy.

Ramesh and Dass, *FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models*, arXiv:2506.09199 (MLSys 2026).

    U S Vh = svd(sum_k p_k s_k B_k A_k)      p = the fewest directions with  sum_{i <= p} S_i^2 >= energy * sum_i S_i^2
    W_0 <- W_0 + U_p S_p Vh_p                then A fresh, B = 0

Exact at ``energy = 1``, when it is FLoRA with a thinner offset. The SVD is taken through two QRs and a small core.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter import low_rank_svd
from strategies.rule import Split, StackRule, fresh


@dataclass(frozen=True, kw_only=True)
class FLoRIST(StackRule):
    """The leading directions join the offset; the nodes start again from A fresh and B = 0."""

    energy: float = 0.95

    name = "florist"
    paper = "arXiv:2506.09199"
    exact = False

    def __post_init__(self) -> None:
        self._demand("energy", 0 < self.energy <= 1, "more than 0, at most 1")

    def split(self, left: Tensor, right: Tensor, rank: int, scale: float, seed: int) -> Split:
        """Nothing to go on from; the leading directions to keep."""
        u, singular, vh = low_rank_svd(left, right)
        share = singular.square().cumsum(0) / singular.square().sum().clamp_min(torch.finfo(singular.dtype).tiny)
        kept = int((share < self.energy).sum()) + 1
        return Split(*fresh(left, right, rank, seed), (u * singular)[:, :kept], vh[:kept])
