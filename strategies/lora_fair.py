"""LoRA-FAIR: averaged factors, with B corrected towards the mean of the products.

Bian et al., *LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement*, arXiv:2411.14961
(ICCV 2025).

    D = sum_k p_k B_k A_k       B' = Bbar + dB       dB = argmin |D - (Bbar + dB) Abar|^2 + ridge |dB|^2

The paper minimises a cosine dissimilarity by gradient descent; with the Frobenius norm the problem has the closed form

    dB = (D - Bbar Abar) Abar^T (Abar Abar^T + ridge I)^-1,        D Abar^T = sum_k p_k B_k (A_k Abar^T)

which is what is built here. Not exact: what of D lies outside the row space of Abar cannot be reached. ``ridge`` keeps
B' near Bbar, without which the paper's accuracy falls below FedIT's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from common.adapter import Key, State, Update, weighted_mean
from strategies.rule import Rule


@dataclass(frozen=True, kw_only=True)
class LoraFair(Rule):
    """Trains and sends A and B; the server averages A and corrects the mean of B."""

    ridge: float = 0.01

    name = "lora-fair"
    paper = "arXiv:2411.14961"
    exact = False
    linear = False

    def __post_init__(self) -> None:
        self._demand("ridge", self.ridge > 0, "more than 0")

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """(Abar, Bbar + dB)."""
        replies = list(updates)
        total = sum(reply.weight for reply in replies)
        adapter = {**state.adapter, **weighted_mean((reply.weight, reply.tensors) for reply in replies)}
        if len(replies) == 1:
            return replace(state, adapter=adapter)
        for layer in state.layers():
            a, b = Key(layer, "A"), Key(layer, "B")
            mean_a, mean_b = adapter[a].double(), adapter[b].double()
            gram = mean_a @ mean_a.T
            gap = -mean_b @ gram
            for reply in replies:
                gap += reply.weight / total * reply.tensors[b].double() @ (reply.tensors[a].double() @ mean_a.T)
            correction = torch.linalg.solve(gram + self.ridge * torch.eye(len(gram), dtype=gram.dtype), gap.T).T
            adapter[b] = (mean_b + correction).to(adapter[b].dtype)
        return replace(state, adapter=adapter)
