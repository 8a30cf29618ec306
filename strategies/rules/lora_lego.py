"""LoRA-LEGO: the nodes' slots clustered, and one slot made of each cluster.

Zhao et al., *Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise Clustering*,
arXiv:2409.16167 (ICLR 2025).

    a slot is the pair (column b of B_k, row a of A_k); the R slots of all nodes are clustered into r
    slot j of the merged adapter <- the mass m_j of cluster j times its mean slot

The paper merges finished adapters, as a sum. As a rule of federated averaging three things are needed besides. A slot
is the same when b is multiplied by c and a divided by it, so slots are first brought to |a| = |b| and to the sign of
their cluster. The mass is the summed weight p_k of the slots in the cluster, so that equal nodes give back the node.
And k-means counts a slot with its weight. Not exact, unless there are as many clusters as slots; what is lost is the
spread within the clusters. Clusters are ordered by size, so that a smaller rank gets the largest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from strategies.rules.stack import Split, Stack, StackRule, fresh

RESTARTS = 4
ITERATIONS = 25


@dataclass(frozen=True, kw_only=True)
class LoraLego(StackRule):
    """Trains and sends A and B; the server clusters their slots."""

    name = "lora-lego"
    paper = "arXiv:2409.16167"

    def split(self, stack: Stack, rank: int, scale: float, seed: int) -> Split:
        """One slot a cluster; a slot without a cluster starts anew."""
        left, right = stack.left, stack.right / (stack.share[:, None] * scale)
        norms_left, norms_right = left.norm(dim=0), right.norm(dim=1)
        alive = (norms_left > 0) & (norms_right > 0)
        b, a = fresh(stack.shape, rank, seed)
        if not alive.any():
            return Split(b, a)
        balance = (norms_right / norms_left).sqrt()[alive]
        slots = torch.cat([left[:, alive].T * balance[:, None], right[alive] / balance[:, None]], dim=1).double()
        # By size, so that the order of the nodes does not matter.
        by_size = slots.square().sum(1).argsort(stable=True)
        slots, share = slots[by_size], stack.share[alive].double()[by_size]
        weights, mass = clusters(slots @ slots.T, share, min(rank, len(slots)), seed)
        centres = weights @ slots
        size = mass * centres[:, : len(left)].norm(dim=1) * centres[:, len(left) :].norm(dim=1)
        order = size.argsort(descending=True, stable=True)
        order = order[size[order] > 0]
        root = mass[order].sqrt()[:, None]
        b[:, : len(order)] = (root * centres[order, : len(left)]).T.to(b.dtype)
        a[: len(order)] = (root * centres[order, len(left) :]).to(a.dtype)
        return Split(b, a)


def clusters(gram: Tensor, share: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weighted k-means up to sign, the best of a few starts (k-means++), from inner products alone.

    ``gram`` is ``n x n``, ``share`` the weight of each slot. Returns the centres as weights of the slots
    (``count x n``), and their masses.
    """
    generator = torch.Generator().manual_seed(seed)
    tries = [_cluster_once(gram, share, count, generator) for _ in range(RESTARTS)]
    _, weights, mass = min(tries, key=lambda found: found[0])
    return weights, mass


def _cluster_once(gram: Tensor, share: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor, Tensor]:
    """One start: the cost (weighted squared distances), the centres' weights and the masses."""
    unit = torch.eye(len(gram), dtype=gram.dtype)
    weights = unit[[_draw(share, generator)]]
    for _ in range(count - 1):
        chosen = _draw(share * _distances(gram, weights).amin(1), generator)
        weights = torch.cat([weights, unit[[chosen]]])
    mass = torch.zeros(count, dtype=gram.dtype)
    for _ in range(ITERATIONS):
        nearest = _distances(gram, weights).argmin(dim=1)
        member = one_hot(nearest, count).to(gram.dtype) * share[:, None]
        sign = torch.where((gram * weights[nearest]).sum(1) < 0, -1.0, 1.0).to(gram.dtype)
        mass = member.sum(0)
        moved = member.T * sign / mass.clamp_min(torch.finfo(mass.dtype).tiny)[:, None]
        if torch.equal(moved, weights):
            break
        weights = moved
    return (share * _distances(gram, weights).amin(1)).sum().item(), weights, mass


def _draw(weight: Tensor, generator: torch.Generator) -> int:
    """An index, as likely as its weight; any where all weights are zero."""
    if not weight.sum() > 0:
        weight = torch.ones_like(weight)
    return int(torch.multinomial(weight, 1, generator=generator))


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    """Squared distances of the slots to the nearer of each centre and its opposite, ``n x count``."""
    products = gram @ weights.T
    squares = gram.diagonal()[:, None] + (weights.T * products).sum(0)[None]
    return (squares - 2 * products.abs()).clamp_min(0)
