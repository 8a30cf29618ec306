"""RoLoRA: the two factors in turns.

Chen et al., *Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA*, arXiv:2502.01755
(NeurIPS 2025).

    rounds 1, 3, 5, ...   A fixed,   B <- sum_k p_k B_k
    rounds 2, 4, 6, ...   B fixed,   A <- sum_k p_k A_k

Exact in every round, because the factor that is not trained is common. B comes first: where B is zero, A has no
gradient. Whose turn it is follows from the round of the state, never from a count that a node keeps, and the state
holds both factors, so a node that skipped rounds catches up.
"""

from dataclasses import dataclass

from strategies.rules.mean import MeanRule
from strategies.rules.rule import Plan


@dataclass(frozen=True, kw_only=True)
class RoLora(MeanRule):
    """Trains, sends and averages B in the first round, A in the second, and so on."""

    name = "rolora"
    paper = "arXiv:2502.01755"

    def plan(self, round: int) -> Plan:
        """B in even rounds, counted from 0; A in odd ones."""
        turn = frozenset({"B" if round % 2 == 0 else "A"})
        return Plan(trained=turn, sent=turn)
