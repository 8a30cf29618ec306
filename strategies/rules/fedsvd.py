"""FedSVD: B averaged, then both factors reframed so that A has orthonormal rows.

Lee et al., *FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA*, arXiv:2505.12805
(NeurIPS 2025).

    A_t fixed        B <- sum_k p_k B_k        U S Vh = svd(B A_t)        A_{t+1} = Vh        B_{t+1} = U S

Exact: one factor is common, and the reframing keeps the product. It is work of the server on what has been released
already, so it costs no privacy. Where B is zero (the first round, or no round yet) A stays as it is; directions that
the product lacks are completed to an orthonormal frame by the SVD itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from common.adapter.algebra import numerical_rank
from common.adapter.threads import each
from common.adapter.values import VARIANCE, Key, LayerShape, State, Tensors, Update
from common.method import option
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Plan


@dataclass(frozen=True, kw_only=True)
class FedSVD(MeanRule):
    """Trains and sends B; the server averages it and reframes A and B."""

    balance: float = option(0.0, ge=0, le=0.5)
    """The power of the singular values that A gets, the rest being B's: 0 for FedSVD, 0.5 for FedASK."""

    name = "fedsvd"
    paper = "arXiv:2505.12805"
    reframes = True
    learning_rate = 2e-2

    def plan(self, round: int) -> Plan:
        """B, in every round."""
        return Plan(trained=frozenset({"B"}), sent=frozenset({"B"}))

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """The mean of B, then A and B of the same product with orthogonal rows of A."""
        merged = super().merge(state, updates)
        adapter, memory = dict(merged.adapter), merged.memory
        able = [layer for layer in merged.layers() if _has_frame(adapter[Key(layer, "B")], adapter[Key(layer, "A")])]

        def framed(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
            return reframe(merged.adapter[Key(layer, "B")], merged.adapter[Key(layer, "A")], self.balance)

        for layer, (framed_b, framed_a) in zip(able, each(able, framed), strict=True):
            a, b = Key(layer, "A"), Key(layer, "B")
            memory = turned(memory, b, adapter[a] @ (framed_a / framed_a.square().sum(1, keepdim=True)).T)
            adapter[b], adapter[a] = framed_b, framed_a
        return replace(merged, adapter=adapter, memory=memory)


def turned(memory: Mapping[str, Tensors], b: Key, turn: torch.Tensor) -> Mapping[str, Tensors]:
    """A server optimizer's memory of B in the new frame, where a step dB becomes dB @ turn.

    A variance keeps none of its correlations, so it is turned as that of independent values.
    """
    return {
        name: {**kept, b: kept[b] @ (turn.square() if name == VARIANCE else turn)} if b in kept else kept
        for name, kept in memory.items()
    }


def _has_frame(b: torch.Tensor, a: torch.Tensor) -> bool:
    """Whether there is a product, of no more slots than either side has directions."""
    return bool(b.any()) and a.shape[0] <= min(b.shape[0], a.shape[1])


def reframe(b: torch.Tensor, a: torch.Tensor, balance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product ``b @ a`` as U S^(1 - balance) and S^balance Vh: ``b = Q R``, then the SVD of the small ``R a``.

    Of the directions it lacks A gets rows of length 1.
    """
    q, r = torch.linalg.qr(b.double())
    u, singular, vh = torch.linalg.svd(r @ a.double(), full_matrices=False)
    found = numerical_rank(singular, LayerShape(len(b), a.shape[1]))
    length = torch.ones_like(singular)
    length[:found] = singular[:found] ** balance
    return ((q @ u) * singular / length).to(b.dtype), (length[:, None] * vh).to(a.dtype)
