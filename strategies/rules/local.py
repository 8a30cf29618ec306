"""Local training: every node trains on its own, and nothing is sent.

No federation at all, but the line that every federation is measured against: what a node reaches with its own data in
the same rounds and steps. Like every rule whose factors are personal it has no global model. A classification head is
shared unless ``task.head`` = ``local``.
"""

from dataclasses import dataclass

from common.adapter.structure import Structure
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Plan


@dataclass(frozen=True, kw_only=True)
class Local(MeanRule):
    """Trains the adapter on the node, and keeps it there."""

    name = "local"
    paper = "none"
    keeps = "adapter"

    @classmethod
    def suits(cls, structure: Structure) -> bool:
        """Any: nothing is done with it."""
        return True

    def plan(self, round: int) -> Plan:
        """All that the structure trains, of which nothing is sent, in every round."""
        return Plan(trained=self.structure.trained, sent=frozenset())
