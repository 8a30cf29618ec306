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

from strategies.stack import Split, Stack, StackRule, fresh

RESTARTS = 4
ITERATIONS = 25


@dataclass(frozen=True, kw_only=True)
class LoraLego(StackRule):
    """Trains and sends A and B; the server clusters their slots."""

    name = "lora-lego"
    paper = "arXiv:2409.16167"
    exact = False

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
        centres, mass = clusters(slots, share, min(rank, len(slots)), seed)
        size = mass * centres[:, : len(left)].norm(dim=1) * centres[:, len(left) :].norm(dim=1)
        order = size.argsort(descending=True, stable=True)
        order = order[size[order] > 0]
        root = mass[order].sqrt()[:, None]
        b[:, : len(order)] = (root * centres[order, : len(left)]).T.to(b.dtype)
        a[: len(order)] = (root * centres[order, len(left) :]).to(a.dtype)
        return Split(b, a)


def clusters(slots: Tensor, share: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weighted k-means up to sign: the centres (``count x d``) and masses of the best of a few starts (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    tries = [_cluster_once(slots, share, count, generator) for _ in range(RESTARTS)]
    _, centres, mass = min(tries, key=lambda found: found[0])
    return centres, mass


def _cluster_once(slots: Tensor, share: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor, Tensor]:
    """One start: the cost (weighted squared distances), the centres and the masses."""
    centres = slots[_draw(share, generator)][None]
    for _ in range(count - 1):
        centres = torch.cat([centres, slots[_draw(share * _distances(slots, centres).amin(1), generator)][None]])
    mass = torch.zeros(count, dtype=slots.dtype)
    for _ in range(ITERATIONS):
        nearest = _distances(slots, centres).argmin(dim=1)
        member = one_hot(nearest, count).to(slots.dtype) * share[:, None]
        sign = torch.where((slots * centres[nearest]).sum(1) < 0, -1.0, 1.0).to(slots.dtype)
        mass = member.sum(0)
        moved = member.T @ (sign[:, None] * slots) / mass.clamp_min(torch.finfo(mass.dtype).tiny)[:, None]
        if torch.equal(moved, centres):
            break
        centres = moved
    return (share * _distances(slots, centres).amin(1)).sum().item(), centres, mass


def _draw(weight: Tensor, generator: torch.Generator) -> int:
    """An index, as likely as its weight; any where all weights are zero."""
    if not weight.sum() > 0:
        weight = torch.ones_like(weight)
    return int(torch.multinomial(weight, 1, generator=generator))


def _distances(slots: Tensor, centres: Tensor) -> Tensor:
    """Squared distances to the nearer of each centre and its opposite, ``n x count``."""
    products = slots @ centres.T
    squares = slots.square().sum(1)[:, None] + centres.square().sum(1)[None]
    return (squares - 2 * products.abs()).clamp_min(0)
