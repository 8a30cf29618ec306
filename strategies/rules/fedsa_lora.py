"""FedSA-LoRA: A is shared, B is personal.

Guo et al., *Selective Aggregation for Low-Rank Adaptation in Federated Learning*, arXiv:2410.01463 (ICLR 2025).

    every node trains A_k and B_k        A <- sum_k p_k A_k        B_k never leaves the node

There is no global model: a node's model is ``W_0 + s B_k A``, so evaluation and export are per node, and a node that
has not trained yet has B = 0, the base model. B_k lives on the node's disk.
"""

from dataclasses import dataclass

from common.adapter.values import FACTORS
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Plan


@dataclass(frozen=True, kw_only=True)
class FedSALora(MeanRule):
    """Trains A and B; sends and averages A."""

    name = "fedsa-lora"
    paper = "arXiv:2410.01463"
    keeps = "b"

    def plan(self, round: int) -> Plan:
        """Both trained, A sent, in every round."""
        return Plan(trained=FACTORS, sent=frozenset({"A"}))
