"""FSLoRA: sketches of one adapter, as large as each node can train.

Fang et al., *Federated Sketching LoRA*, arXiv:2501.19389. A node of rank r_k draws a set J of r_k of the r slots in every
round, S_k = (r / r_k) diag(1 where j in J), and

    computes with     W_0 + s B S_k A,  which is  W_0 + s (r / r_k) B[:, J] A[J]
    trains and sends  the differences of B[:, J] and A[J]
    server            B <- B + sum_k p_k D_k,  A likewise,  a slot without a difference counting as zero

The sketch is unbiased, E[B S_k A] = B A, and of a variance of r / r_k - 1 times the product's size. So that steps are
unbiased, too, all nodes count in every slot, where Fed-PLoRA takes the mean over those that trained it. Nodes of full
rank make it FedIT. Not exact, for FedIT's reason. A node of a smaller rank has no more than its sketch, and scores that.

The published code never sketches: it looks for parameters that are called ``lora_A`` alone, and draws one set for A and
another for B.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from common.adapter.values import FACTORS, State, Tensors, Update
from strategies.rules.changes import ChangeRule


@dataclass(frozen=True, kw_only=True)
class FSLora(ChangeRule):
    """Trains a draw of the slots of A and B, enlarged by as much as are left out; the server averages the changes."""

    name = "fslora"
    paper = "arXiv:2501.19389"
    mixed_ranks = True
    scattered = True

    def view(self, state: State, rank: int, draw: int = 0) -> State:
        """The drawn slots alone, at a larger scale."""
        self.check_rank(rank, state.rank)
        if rank == state.rank:
            return state
        return sketched(state, sorted(random.Random(draw).sample(range(state.rank), rank)))

    def received(self, state: State, update: Update) -> State:
        """The sketch of the slots that the update names."""
        return sketched(state, update.slots) if update.slots and not state.slots else state

    def collected(self, state: State, updates: Iterable[Update]) -> Iterator[tuple[float, Tensors]]:
        """Differences of all slots; of those that a node has not trained, zero."""
        return ((update.weight, whole(state, update)) for update in updates)


def sketched(state: State, slots: Sequence[int]) -> State:
    """What a node of these slots computes with."""
    kept = {"A": (slots,), "B": (slice(None), slots)}
    adapter = {key: tensor[kept[key.part]] if key.part in FACTORS else tensor for key, tensor in state.adapter.items()}
    return replace(state, adapter=adapter, scale=state.scale * state.rank / len(slots), slots=tuple(slots))


def whole(state: State, update: Update) -> Tensors:
    """The tensors of an update with zeros in the slots that it lacks."""
    if not update.slots:
        return update.tensors
    index = torch.tensor(update.slots)
    return {
        key: torch.zeros_like(state.adapter[key]).index_copy_("BA".index(key.part) ^ 1, index, tensor)
        if key.part in FACTORS
        else tensor
        for key, tensor in update.tensors.items()
    }
