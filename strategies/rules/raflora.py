"""raFLoRA: nodes of several ranks, each slot weighted among the nodes that have it.

Wu et al., *Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity*, arXiv:2602.13486.
With n_k the weight of node k, r_k its rank and N_j the weight of all nodes of a rank above j,

    D = sum_j sum_{k: r_k > j} (n_k / N_j) s_k B_k[:, j] A_k[j]        U S Vh = svd(D)
    B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) Vh_r        a node of rank q gets the first q slots

FlexLoRA weighs every slot by n_k / sum_i n_i, so that nodes without the last slots count there as zeros: what only some
nodes can hold shrinks by the same factor in every round, and the energy of the update collapses into the smallest rank.
Here the last slots stay as large as their own nodes have made them; among nodes of one rank it is FlexLoRA. Not exact:
nodes of a large rank count for more, which is the point, and what lies beyond rank r is lost.

The paper's partitions are the slots from one rank to the next, which have the same nodes; slot by slot it is the same
sum. Slots that no node of the round has would become zero, and what was learned in them be forgotten: here they stay as
they were. PreLort (arXiv:2606.15963), too, averages a slot over the nodes that have it, and trains nested adapters, of
which its summary says no more; ``adapter.name = "dylora"`` under this rule is near it, and ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.adapter.algebra import balanced, low_rank_svd, numerical_rank
from common.adapter.values import FACTORS, State, Update
from strategies.rules.stack import Split, Stack, StackRule, padded, revived


@dataclass(frozen=True, kw_only=True)
class RaFLora(StackRule):
    """The best factors of the state's rank, of an update whose slots are averaged each over the nodes that have it."""

    name = "raflora"
    paper = "arXiv:2602.13486"

    def shares(self, replies: Sequence[Update]) -> list[Tensor]:
        """Each node's weight among those who have a slot."""
        slots = [list(reply.slots or range(reply.rank)) for reply in replies]
        held = torch.zeros(1 + max(map(max, slots)), dtype=torch.float64)
        for own, reply in zip(slots, replies, strict=True):
            held[own] += reply.weight
        return [reply.weight / held[own] for own, reply in zip(slots, replies, strict=True)]

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """The stack of the nodes' slots, and of the state's own that no node has, divided."""
        # Nodes have the leading slots, whatever they say.
        replies = [replace(update, slots=()) for update in updates]
        most = max(reply.rank for reply in replies)
        if most < state.rank:
            factors = ((key, tensor) for key, tensor in state.adapter.items() if key.part in FACTORS)
            rest = {key: tensor[most:] if key.part == "A" else tensor[:, most:] for key, tensor in factors}
            replies.append(Update(rest, 1.0, state.scale, slots=tuple(range(most, state.rank))))
        return super().merge(state, replies)

    def split(self, stack: Stack, rank: int, scale: float, seed: int) -> Split:
        """The leading singular directions, balanced over both factors."""
        u, singular, vh = low_rank_svd(stack.left.double(), stack.right.double())
        kept = min(rank, numerical_rank(singular, stack.shape))
        b, a = (t.float() for t in padded(*balanced(u, singular / scale, vh, kept), rank))
        return Split(b, revived(b, a, seed))
