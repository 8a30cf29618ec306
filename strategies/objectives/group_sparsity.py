"""Group sparsity: whole layers are pressed towards zero, so that a run changes as few of them as it can do with.

Zhao et al., *Continual Forgetting for Pre-trained Vision Models* (GS-LoRA), arXiv:2403.11530 (CVPR 2024).

    loss + weight sum_l sqrt(|A_l|^2 + |B_l|^2)

A group is an adapted layer, with whatever is trained of it; in the paper it is a block's two feed-forward layers. The
term pulls every group with the same force, so that one whose own gradient is weaker goes to zero, and the others are
hardly shortened. Under AdamW it ends within a step or so of it, which no threshold cuts off. Under FFA-LoRA a group is
B alone, which starts at zero, where the term has no slope. It looks at no data, and so costs a private run nothing.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.values import HEAD, Tensors
from common.method import option
from strategies.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class GroupSparsity(Objective):
    """Presses each layer's factors towards zero together."""

    weight: float = option(1e-3, gt=0, le=1000)
    """The weight of the sum of the layers' norms, alpha in the paper."""

    name = "group-sparsity"
    paper = "arXiv:2403.11530"

    def penalty(self, trained: Tensors, earlier: Tensors) -> Tensor:
        groups = defaultdict[str, list[Tensor]](list)
        for key, tensor in trained.items():
            if key.part not in HEAD:
                groups[key.layer].append(tensor.flatten())
        return self.weight * torch.stack([torch.cat(group).norm() for group in groups.values()]).sum()
