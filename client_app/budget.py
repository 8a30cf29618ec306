"""Charging the privacy budget of this machine: durable before training looks at the data, and never past the limit.

The coordinator is not believed in anything that a limit depends on. Its names of runs, its rounds and the epsilon that
it declares decide nothing but what it declared itself; what was spent is the sum of the rows that were written here.

A crash between the charge and the update wastes what was charged. Nothing can spend without a charge, so nothing can
overspend. A round that is tried again draws fresh noise: it is another release, and is charged again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import durable
from common.config.privacy import PrivacyConfig
from common.error import RefusalError
from common.privacy import accounting, ledger
from common.privacy.accounting import Release
from common.privacy.ledger import DataSet, Entry
from common.stamp import utc_now


@dataclass(frozen=True)
class Limits:
    """What the operator allows at ``delta``: ``epsilon`` in all, ``run_epsilon`` under a run's name; 0 is no limit."""

    epsilon: float
    delta: float
    run_epsilon: float


class Budget:
    """The budget of a node, which is that of its state ``directory``, whatever the data and the ``node`` are called."""

    def __init__(self, directory: Path, witness: Path, node: str, limits: Limits) -> None:
        self._directory = directory
        self._witness = witness
        self._node = node
        self._limits = limits

    def charge(
        self,
        release: Release,
        privacy: PrivacyConfig,
        *,
        run: str,
        round: int,
        rule: str,
        dataset: DataSet | None = None,
    ) -> Entry:
        """Write a release down, for good, before it is made.

        Every row counts, or with a ``dataset`` every one that may be about a record in it. Raises
        :class:`RefusalError`, with no figure of what was spent, where the release would pass a limit or what the run
        declared, and where the ledger was changed by another hand or could have been; :class:`DiskError` where the
        disk does not take the row.
        """
        release = accounting.by_record(release, privacy.mode)
        while True:
            book = ledger.load(self._directory, self._witness)
            spent = book.counting(dataset)
            self._check_run(spent, release, privacy, run)
            entry = Entry(
                number=book.head.number + 1,
                time=utc_now(),
                dataset=dataset.fingerprint if dataset else "",
                node=self._node,
                run=run,
                round=round,
                rule=rule,
                mechanism=privacy.mode,
                noise_multiplier=float(release.noise_multiplier),
                sample_rate=float(release.sample_rate),
                steps=release.steps,
                accountant=privacy.accountant,
                delta=self._limits.delta,
                epsilon=self._total(spent, release, privacy),
            ).chained(book.head.digest)
            with durable.writing("the privacy ledger", ledger.path(self._directory), durable.OF_A_NODE):
                newest = ledger.append(self._directory, self._witness, book.head, entry, dataset)
            # Else whoever was faster while this was computed has spent some of it.
            if newest:
                print(f"privacy budget: row {entry.number}, head {entry.digest[:16]}", file=sys.stderr)
                return entry

    def _total(self, spent: Sequence[Entry], release: Release, privacy: PrivacyConfig) -> float:
        """Epsilon with this release. Its figure stays here."""
        limit, delta = self._limits.epsilon, self._limits.delta
        total = accounting.epsilon([*(row.release for row in spent), release], delta, privacy.accountant)
        if limit and total > limit:
            raise RefusalError(
                "the privacy budget of this node is spent",
                where=f"{self._node}, privacy-epsilon",
                expected=f"at most epsilon {limit:g} at delta {delta:g} over all runs",
                got="more with this round",
                cure="Its operator can see what was spent with `bouquet ledger show`.",
            )
        return total

    def _check_run(self, spent: Sequence[Entry], release: Release, privacy: PrivacyConfig, run: str) -> None:
        """Refuse a release with which the rows of this run's name pass the operator's limit, or the run's own."""
        limit, delta = self._limits.run_epsilon, self._limits.delta
        rows = [row for row in spent if row.run == run]
        releases = [*(row.release for row in rows), release]
        if limit and accounting.epsilon(releases, delta, privacy.accountant) > limit:
            raise RefusalError(
                "this run has spent what the node's operator allows for one run",
                where=f"{self._node}, max-epsilon",
                expected=f"at most epsilon {limit:g} at delta {delta:g} over the run",
                got="more with this round",
                cure="Plan the run for less: lower privacy.epsilon or num-server-rounds, or raise the noise.",
            )
        # What a run declares is for a node that is there or not, and it is the node's own rows that it is about.
        own = [accounting.by_node(row.release, row.mechanism) for row in rows if row.node == self._node]
        declared = accounting.epsilon(
            [*own, accounting.by_node(release, privacy.mode)], privacy.delta, privacy.accountant
        )
        if not privacy.noise_multiplier and declared > privacy.epsilon:
            raise RefusalError(
                "this run has spent the epsilon that it declared",
                where=f"{self._node}, privacy.epsilon",
                expected=f"at most epsilon {privacy.epsilon:g} at delta {privacy.delta:g} over the run",
                got="more with this round",
                cure="Retried rounds are charged again, and earlier runs of the same name count too: "
                "give another run another run-name.",
            )
