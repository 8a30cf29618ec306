"""Orthogonality to earlier tasks: A looks where the adapter that the run starts from does not.

Wang et al., *Orthogonal Subspace Learning for Language Model Continual Learning* (O-LoRA), arXiv:2310.14152
(Findings of EMNLP 2023).

    loss + weight sum_l |A_l U_l^T|^2        A  r x d_in        U  q x d_in, orthonormal

``model.adapter`` stays as it is, as the offset Q P under fresh factors, and U spans what its layers look at: the right
singular directions of Q P. Exported, both are one LoRA, from which the run for the next task starts; its U then spans
those of all tasks before it. In the paper the rows of the earlier A stand in the place of U, so that the term depends
on how their update is shared out between A and B; the published code adds absolute values and not squares. The term
looks at no data, and so costs a private run nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.algebra import low_rank_svd, numerical_rank
from common.adapter.values import Key, LayerShape, Tensors
from common.method import option
from strategies.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Objective):
    """Turns A away from what an earlier adapter looks at, which stays under it."""

    weight: float = option(0.5, gt=0, le=1000)
    """The weight of what A has in the earlier directions, squared; lambda in the paper."""

    name = "orthogonal"
    paper = "arXiv:2310.14152"
    over = True

    def earlier(self, offset: Tensors) -> Tensors:
        found = Tensors()
        for key, left in offset.items():
            if key.part == "Q":
                right = offset[Key(key.layer, "P")]
                _, singular, directions = low_rank_svd(left.double(), right.double())
                rank = numerical_rank(singular, LayerShape(len(left), right.shape[1]))
                found[Key(key.layer, "P")] = directions[:rank].float()
        return found

    def penalty(self, trained: Tensors, earlier: Tensors) -> Tensor | None:
        overlaps = [
            (trained[Key(key.layer, "A")] @ directions.T).square().sum()
            for key, directions in earlier.items()
            if Key(key.layer, "A") in trained
        ]
        return self.weight * torch.stack(overlaps).sum() if overlaps else None
