"""FlexLoRA: the weighted mean of the products, cut to each node's rank by an SVD.

Bai et al., *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources*,
arXiv:2402.11505 (NeurIPS 2024).

    U S Vh = svd(sum_k p_k s_k B_k A_k)        a node of rank q gets  A = Vh[:q],  B = U[:, :q] S[:q] / s

The factors of a smaller rank are the leading ones of a larger, so the state holds those of the largest and a view takes
a slice. Not exact: what lies beyond rank q is lost, and the error is the norm of the singular values that were cut.
Slots for which the update has no direction, as after a round of few nodes, start anew: A drawn and B zero.
"""

from dataclasses import dataclass

from common.adapter.algebra import low_rank_svd, numerical_rank
from strategies.rules.stack import Split, Stack, StackRule, padded, revived


@dataclass(frozen=True, kw_only=True)
class FlexLora(StackRule):
    """The best factors of the state's rank to go on from; nothing kept beside them."""

    name = "flexlora"
    paper = "arXiv:2402.11505"

    def split(self, stack: Stack, rank: int, scale: float, seed: int) -> Split:
        """The leading singular directions, with the singular values on B, as in the paper."""
        u, singular, vh = low_rank_svd(stack.left.double(), stack.right.double())
        kept = min(rank, numerical_rank(singular, stack.shape))
        b, a = (t.float() for t in padded((u * singular)[:, :kept] / scale, vh[:kept], rank))
        return Split(b, revived(b, a, seed))
