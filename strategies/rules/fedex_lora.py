"""FedEx-LoRA: averaged factors, and their error as a frozen offset.

Singhal, Ponkshe, Vepakomma, *FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models*, arXiv:2410.09432 (ACL 2025).

    A <- Abar = sum_k p_k A_k        B <- Bbar = sum_k p_k B_k
    E  = s (sum_k p_k B_k A_k - Bbar Abar),    W_0 <- W_0 + E

The paper folds E into the base weights; a 4-bit base would round it away, so here E joins the frozen offset. E is the
covariance of the factors over the nodes, and since ``sum_k p_k (B_k - Bbar) = 0`` any one node's A may be taken off:

    E = sum_{k < K} s p_k (B_k - Bbar)(A_k - A_K)

a factorisation of rank (K-1) r that needs no decomposition. Exact for equal ranks. ``residual_rank`` cuts E to its
leading singular directions, the paper's cheaper and inexact variant; 0 keeps all of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from common.adapter.algebra import extend_offset, low_rank_svd, weighted_mean
from common.adapter.values import Key, State, Tensors, Update
from common.method import option
from strategies.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class FedExLora(Rule):
    """Trains and sends A and B; the server averages both and extends the offset by what the average missed."""

    residual_rank: int = option(0, ge=0)
    """The rank to which a round's residual is cut; 0 keeps all of it, which is exact."""

    name = "fedex-lora"
    paper = "arXiv:2410.09432"

    @property
    def exact(self) -> bool:
        """With the whole residual, and an offset that is never cut."""
        return self.offset_energy == 1 and self.residual_rank == 0

    def growth(self, nodes: int, rank: int) -> int:
        """The residual's rank."""
        return min((nodes - 1) * rank, self.residual_rank or (nodes - 1) * rank)

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """(Abar, Bbar) for the nodes to continue from, and E beside what the offset already holds."""
        replies = list(updates)
        mean = weighted_mean((reply.weight, reply.tensors) for reply in replies)
        adapter = {**state.adapter, **mean}
        if len(replies) == 1:
            return replace(state, adapter=adapter)

        total = sum(reply.weight for reply in replies)
        *others, last = replies
        residual: Tensors = {}
        for layer in state.layers():
            a, b = Key(layer, "A"), Key(layer, "B")
            left = torch.cat(
                [state.scale * reply.weight / total * (reply.tensors[b] - mean[b]) for reply in others], dim=1
            )
            right = torch.cat([reply.tensors[a] - last.tensors[a] for reply in others], dim=0)
            if 0 < self.residual_rank < left.shape[1]:
                u, singular, vh = low_rank_svd(left.double(), right.double())
                left, right = (u * singular)[:, : self.residual_rank].float(), vh[: self.residual_rank].float()
            residual[Key(layer, "Q")], residual[Key(layer, "P")] = left, right
        return replace(state, adapter=adapter, offset=extend_offset(state.offset, residual, self.offset_energy))
