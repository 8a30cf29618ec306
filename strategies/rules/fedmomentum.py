"""FedMomentum: the best factors to go on from, and the rest as a frozen offset.

*FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning*, arXiv:2603.08014.

    U S Vh = svd(sum_k p_k s_k B_k A_k)
    B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) Vh_r        W_0 <- W_0 + sum_{i > r} u_i S_i vh_i

Exact, with the smallest offset that any choice of rank-r factors leaves (Eckart-Young). Slots for which the update has
no direction start anew, A drawn and B zero: with both factors zero they would never learn again.
"""

from dataclasses import dataclass

from common.adapter.algebra import balanced, low_rank_svd, numerical_rank
from strategies.rules.stack import Split, Stack, StackRule, padded, revived


@dataclass(frozen=True, kw_only=True)
class FedMomentum(StackRule):
    """The leading directions to go on from, balanced over both factors; the others join the offset."""

    name = "fedmomentum"
    paper = "arXiv:2603.08014"

    @property
    def exact(self) -> bool:
        """As long as the offset is never cut."""
        return self.offset_energy == 1

    def growth(self, nodes: int, rank: int) -> int:
        """All directions of the stack but the leading ones."""
        return (nodes - 1) * rank

    def split(self, stack: Stack, rank: int, scale: float, seed: int) -> Split:
        """The leading ``rank`` directions, and those after them that are not numerically zero."""
        u, singular, vh = low_rank_svd(stack.left.double(), stack.right.double())
        found = numerical_rank(singular, stack.shape)
        b, a = (t.float() for t in padded(*balanced(u, singular / scale, vh, min(rank, found)), rank))
        last = max(rank, found)
        return Split(b, revived(b, a, seed), (u * singular)[:, rank:last].float(), vh[rank:last].float())
