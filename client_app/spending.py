"""What a run takes from a node's budget: planned from public numbers, judged by the policy, charged."""

import traceback
from dataclasses import dataclass

from client_app.budget import Budget, Limits
from client_app.clipping import Clip
from client_app.policy import Policy
from common import owned, webhook
from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.error import RefusalError
from common.privacy import accounting
from common.privacy.accounting import Release
from common.privacy.ledger import DataSet
from common.sources import stable

NEARLY = 0.8
"""The share of a budget from which on whoever watches over the node is told."""


@dataclass(frozen=True)
class Spending:
    """The releases of one run on one node. ``run`` and ``rule`` are names, to be written down and not trusted."""

    config: RunConfig
    node: NodeConfig
    policy: Policy
    rule: str
    run: str

    @property
    def records(self) -> int:
        """The public number of the node's units, its operator's or the run's. Raises :class:`RefusalError` without."""
        if not (number := self.node.records or self.config.privacy.records):
            raise RefusalError(
                "a private run needs the public number of a node's records",
                where=f"{self.node.label}, records",
                expected="1 or more, rounded as its operator likes",
                cure="Set records in --node-config, or privacy.records in the run config for all nodes without it.",
            )
        return number

    def check_places(self) -> None:
        """Raise :class:`RefusalError` where a charge could not be written; told before a round, not in one."""
        for folder in (self.node.ledger, self.node.witness.parent):
            owned.check_writable(folder)

    def plan(self) -> Release:
        """What a round of training gives away. Raises :class:`BouquetError` where nothing can be planned so."""
        config, privacy = self.config, self.config.privacy
        number = config.trained_on(self.records) if privacy.per_example else 1
        release = accounting.plan(privacy, number, config.train.steps, config.num_server_rounds, config.scores)
        Clip(privacy, release.noise_multiplier)  # what it refuses is told before it is charged
        return release

    def charge(self, release: Release, round: int) -> float:
        """Write a release in the ledger: from here on it counts as given. Epsilon with it, over all runs.

        Raises :class:`RefusalError` where the policy or the budget does not allow it.
        """
        self.policy.check_release(release)
        limits = Limits(self.node.privacy_epsilon, self.node.privacy_delta, self.policy.privacy.max_epsilon)
        budget = Budget(self.node.ledger, self.node.witness, self.node.label, limits)
        entry = budget.charge(
            release, self.config.privacy, run=self.run, round=round, rule=self.rule, dataset=self._dataset()
        )
        if limits.epsilon and entry.epsilon > NEARLY * limits.epsilon:
            webhook.tell(f"{self.node.label}: {entry.epsilon:.3g} of epsilon {limits.epsilon:g} is spent")
        return entry.epsilon

    def _dataset(self) -> DataSet | None:
        """The data set that a release is charged to; None for all of the node's: by default, and where none is read."""
        if not (fields := self.policy.budget.fields) or self.node.script:
            return None
        try:
            found = stable.node_records(self.config.data, self.node, self.config.seed)
            return DataSet.of(found, fields)
        except Exception:
            traceback.print_exc()
            return None
