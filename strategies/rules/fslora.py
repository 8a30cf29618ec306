"""FSLoRA: sketches of one adapter, as large as each node can train.

Fang et al., *Federated Sketching LoRA*, arXiv:2501.19389. In every round a node of rank r_k draws a set J of r_k of the
r slots, S_k = (r / r_k) diag(1 where j in J), and

    computes with     W_0 + s B S_k A  =  W_0 + s (r / r_k) B[:, J] A[J]
    trains and sends  the differences of B[:, J] and A[J]
    server            B <- B + sum_k p_k D_k,  A likewise,  a slot without a difference counting as zero

The sketch is unbiased, E[B S_k A] = B A; its variance is r / r_k - 1 times what the product would have. All nodes count
in every slot, where under Fed-PLoRA those count that have trained it. Nodes of full rank make it FedIT. Not exact, for
FedIT's reason. A node of a smaller rank has no more than its sketch, and that is what it scores.

The published code never sketches: it looks for tensors whose whole name is ``lora_A``. Where it would, A and B would
have a set of their own each.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from common.adapter.values import State, Tensors, Update
from strategies.rules.changes import ChangeRule

ALONG = {"A": 0, "B": 1}
"""The dimension of a factor along which its slots lie."""


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
    adapter = {
        key: tensor.index_select(ALONG[key.part], torch.tensor(slots)) if key.part in ALONG else tensor
        for key, tensor in state.adapter.items()
    }
    return replace(state, adapter=adapter, scale=state.scale * state.rank / len(slots), slots=tuple(slots))


def whole(state: State, update: Update) -> Tensors:
    """The tensors of an update with zeros in the slots that it lacks."""
    slots = torch.tensor(update.slots or range(state.rank))
    return {
        key: torch.zeros_like(state.adapter[key]).index_copy_(ALONG[key.part], slots, tensor)
        if key.part in ALONG
        else tensor
        for key, tensor in update.tensors.items()
    }
