"""A vote by ranks: a node says which values are larger than which, and nothing of how large they are.

After Mozaffari et al., *FRL: Federated Rank Learning*, arXiv:2110.04350 (USENIX Security 2023), whose nodes rank the
weights of a random network, and whose server adds up the ranks and sorts by their sum. Here, which is ours, ordinary
tensors are ranked by their values; with x_(i) the i-th smallest value of a tensor,

    vote of place i    sum_k rank_k(i)             of equal values a node gives all the mean rank
    result             at the place of the i-th smallest vote the median over the nodes of x_k,(i)

so that a node of any size moves a mean rank by a K-th of all ranks at most, and nodes that agree are an identity. Every
node has one vote. Where honest nodes agree on an order, fewer than half of all do not turn it by ranking the other way.
Unlike a median of single values it takes sides between values, and not within one: a hostile node can still exchange
values that the others rank next to each other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.algebra import mean_of
from common.adapter.values import State, Tensors
from strategies.means.mean import Mean, Memory, Updates


@dataclass(frozen=True, kw_only=True)
class RankVote(Mean):
    """The median sizes, in the order that the sum of all nodes' ranks has."""

    name = "rank-vote"
    paper = "arXiv:2110.04350"

    def __call__(self, state: State, updates: Updates) -> tuple[Tensors, Memory]:
        replies = [tensors for _, tensors in updates]
        return {key: voted([tensors[key] for tensors in replies]) for key in replies[0]}, {}


def voted(values: list[Tensor]) -> Tensor:
    """The outcome of the vote over one tensor."""
    flat = torch.stack([value.reshape(-1) for value in values])
    ordered = flat.sort(dim=1).values
    # Twice the mean rank, which is whole.
    ranks = torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True)
    middle = ordered.sort(dim=0).values[(len(values) - 1) // 2 : len(values) // 2 + 1]
    order = ranks.sum(0).argsort(stable=True)
    return torch.empty_like(flat[0]).index_copy_(0, order, mean_of(list(middle))).reshape(values[0].shape)
