"""FLASC: sparse messages, dense training.

Kuo et al., *Federated LoRA with Sparse Communication*, arXiv:2406.05233. CELLM, arXiv:2407.20557, is the same.
With t the values of all layers together and top(x, d) the mask of the share d of largest magnitudes among them,

    down   m = top(A of t, down) and top(B of t, down),   a node starts from t * m and trains all of it
    up     D_k = (t_k - t * m) * top(t_k - t * m, up)
    server t <- t + sum_k p_k D_k,        or a server optimizer's step along it

One threshold over all layers; the masks down and up have nothing to do with each other; what is sent is the difference
from the *masked* start, or a masked value would look like a change of -t. With both shares at 1 it is FedIT with the
same step. Masked values travel as a bitmap and the values that remain. A head is not masked.

Two things differ from the paper, whose runs have 200 rounds. Its threshold on the way down is one over both factors;
but B starts at zero, and no value of it passes those of A in a few rounds, so here each factor has a threshold of its
own, for the same share. And its server steps by Adam at a rate of 1e-3 (``server-optimizer.name = "adam"``), which
moves next to nothing in a few rounds.
"""

from dataclasses import dataclass, replace

import torch

from common.adapter.values import FACTORS, HEAD, State, Tensors
from common.method import option
from strategies.rules.changes import ChangeRule


@dataclass(frozen=True, kw_only=True)
class FLASC(ChangeRule):
    """Trains A and B; sends the largest differences; the server steps along their mean."""

    down: float = option(0.25, gt=0, le=1)
    """The share of each factor's values that travels to the nodes; 1 for all."""
    up: float = option(0.25, gt=0, le=1)
    """The share of the differences that travels back; 1 for all."""

    name = "flasc"
    paper = "arXiv:2406.05233"

    @property
    def density(self) -> tuple[float, float]:
        """The shares that are kept."""
        return self.up, self.down

    def view(self, state: State, rank: int, draw: int = 0) -> State:
        """The state with all but the largest values of either factor zero."""
        self.check_rank(rank, state.rank)
        parted = ({key: t for key, t in state.adapter.items() if key.part == part} for part in sorted(FACTORS))
        masked_a, masked_b = (largest(factor, self.down) for factor in parted)
        return replace(state, adapter={**state.adapter, **masked_a, **masked_b})

    def send(self, received: State, local: Tensors) -> Tensors:
        """The largest differences from what was received; zero elsewhere."""
        change = super().send(received, local)
        return {**change, **largest(change, self.up)}


def largest(tensors: Tensors, share: float) -> Tensors:
    """The factors among ``tensors`` with all but a share of their values, the largest over all layers, set to zero."""
    factors = {key: tensor for key, tensor in tensors.items() if key.part not in HEAD}
    flat = torch.cat([tensor.reshape(-1) for tensor in factors.values()])
    kept = max(1, int(share * len(flat)))
    if kept == len(flat):
        return factors
    places = flat.abs().topk(kept, sorted=False).indices
    sparse = torch.zeros_like(flat).index_copy_(0, places, flat[places])
    chunks = torch.split(sparse, [tensor.numel() for tensor in factors.values()])
    return {key: chunk.reshape(tensor.shape) for (key, tensor), chunk in zip(factors.items(), chunks, strict=True)}
