"""Local training: every node trains on its own, and nothing is sent.

No federation at all, but the line that every federation is measured against: what a node reaches with its own data in
the same rounds and steps. Like every rule whose factors are personal it has no global model. A classification head is
shared unless ``task.head`` = ``local``.
"""

from dataclasses import dataclass

from common.adapter.values import FACTORS
from strategies.rules.rule import MeanRule, Plan


@dataclass(frozen=True, kw_only=True)
class Local(MeanRule):
    """Trains A and B on the node, and keeps them there."""

    name = "local"
    paper = "none"
    keeps = "adapter"

    def plan(self, round: int) -> Plan:
        """Both trained, neither sent, in every round."""
        return Plan(trained=FACTORS, sent=frozenset())
