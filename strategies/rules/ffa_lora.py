"""FFA-LoRA: A frozen, B averaged.

Sun et al., *Improving LoRA in Privacy-preserving Federated Learning*, arXiv:2403.12313 (ICLR 2024).

    A = A_0, drawn once and the same on every node        B <- sum_k p_k B_k

Exact, because one factor is common: ``s (sum_k p_k B_k) A_0 = sum_k p_k s B_k A_0``. Half the parameters of FedIT are
trained, sent and, under privacy, noised. B alone does what both factors do elsewhere, at a larger learning rate.
"""

from dataclasses import dataclass

from common.adapter.structure import Structure
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Plan

B_ONLY = frozenset({"B"})


@dataclass(frozen=True, kw_only=True)
class FFALora(MeanRule):
    """Trains, sends and averages B; every side draws A_0 from the run's seed, so A never travels."""

    name = "ffa-lora"
    paper = "arXiv:2403.12313"
    learning_rate = 2e-2

    @classmethod
    def suits(cls, structure: Structure) -> bool:
        """One whose update is linear in B, the rest being fixed."""
        return structure.trained >= B_ONLY and B_ONLY in structure.linear_in

    def plan(self, round: int) -> Plan:
        """B, in every round."""
        return Plan(trained=B_ONLY, sent=B_ONLY)
