"""FedIT: federated averaging of both LoRA factors.

Zhang et al., *Towards Building the Federated GPT: Federated Instruction Tuning*, arXiv:2305.05644 (ICASSP 2024).

    A <- sum_k p_k A_k        B <- sum_k p_k B_k        p_k = n_k / sum_j n_j over the nodes that replied

Not exact: the mean of products is not the product of means. What is lost is the covariance of the factors over the
nodes, ``sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A)``; it vanishes when one factor is common to all.
"""

from dataclasses import dataclass

from common.adapter.structure import Structure
from strategies.rules.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class FedIT(MeanRule):
    """Trains, sends and averages A and B, or whatever else the structure trains."""

    name = "fedit"
    paper = "arXiv:2305.05644"

    @classmethod
    def suits(cls, structure: Structure) -> bool:
        """Any: what a structure trains is averaged."""
        return True
