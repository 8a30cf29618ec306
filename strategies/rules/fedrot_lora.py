"""FedRot-LoRA: each node turns its factors towards the common ones before they are averaged.

Zhang et al., *FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA*, arXiv:2602.23638 (ICML 2026).

    rounds of A:  U S Vh = svd(A_k A_ref^T)      rounds of B:  U S Vh = svd(B_k^T B_ref)      R = U Vh, det R = 1
    soft:  R <- the rotation nearest to (1 - softness) I + softness R
    send   R^T A_k,  B_k R        the server averages both, as FedIT

The product of a node is unchanged, ``B_k R R^T A_k = B_k A_k``; the factors of different nodes lie closer together, so
the mean loses less. A_ref and B_ref are the received factors; the two kinds of round alternate, and the first is
skipped, when B_ref is zero. The published code's hard variant lacks the condition on the determinant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.values import Key, State, Tensors
from common.method import option
from strategies.rules.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class FedRotLora(MeanRule):
    """FedIT after a rotation at the node; ``softness`` from 0 (FedIT) to 1 (the whole rotation)."""

    softness: float = option(0.5, ge=0, le=1)
    """How much of the rotation is made: 0 is FedIT, 1 the whole of it."""

    name = "fedrot-lora"
    paper = "arXiv:2602.23638"

    turns = True

    def send(self, received: State, local: Tensors) -> Tensors:
        """The factors, turned towards the received ones."""
        sent = super().send(received, local)
        if received.round == 0 or self.softness == 0:
            return sent
        for layer in received.layers():
            a, b = Key(layer, "A"), Key(layer, "B")
            if received.round % 2 == 0:
                rotation = nearest_rotation(sent[a] @ received.adapter[a].T)
            else:
                rotation = nearest_rotation(sent[b].T @ received.adapter[b])
            identity = torch.eye(len(rotation), dtype=rotation.dtype)
            rotation = nearest_rotation((1 - self.softness) * identity + self.softness * rotation)
            sent[a] = (rotation.T @ sent[a].double()).to(sent[a].dtype)
            sent[b] = (sent[b].double() @ rotation).to(sent[b].dtype)
        return sent


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation (determinant 1) that is nearest to an ``r x r`` matrix; float64."""
    u, _, vh = torch.linalg.svd(matrix.double())
    if torch.linalg.det(u @ vh) < 0:
        vh = torch.cat([vh[:-1], -vh[-1:]])
    rotation: Tensor = u @ vh
    return rotation
