"""Charging the privacy budget of this machine: durable before training looks at the data, and never past the limit.

A crash between the charge and the update wastes what was charged. Nothing can spend without a charge, so nothing can
overspend. A round that is tried again draws fresh noise: it is another release, and is charged again.
"""

import time
from dataclasses import astuple
from pathlib import Path
from sqlite3 import Connection

from common import accounting, ledger
from common.accounting import Accountant, Release
from common.config import PrivacyConfig
from common.error import RefusalError
from common.ledger import DataSet, Entry


class Ledger:
    """The budget of one node: ``epsilon`` at ``delta`` over everything that its data ever cost; 0 is no limit."""

    def __init__(self, directory: Path, node: str, epsilon: float, delta: float) -> None:
        self._directory = directory
        self._node = node
        self._epsilon = epsilon
        self._delta = delta

    def charge(
        self, release: Release, dataset: DataSet, privacy: PrivacyConfig, *, run: str, round: int, rule: str
    ) -> Entry:
        """Write a release down, for good, before it is made.

        Raises :class:`RefusalError` where it would pass the node's budget or what the run declared, and where the
        ledger was changed by another hand.
        """
        with ledger.connect(self._directory) as connection:
            # One writer at a time, from before the sum is read until the row that changes it is on the disk.
            connection.execute("BEGIN IMMEDIATE")
            rows = ledger.entries(connection, self._directory)
            related = _register(connection, dataset)
            spent = [row for row in rows if row.dataset in related]
            self._check_declared(spent, release, privacy, run)
            entry = Entry(
                number=len(rows) + 1,
                time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                dataset=dataset.fingerprint,
                node=self._node,
                run=run,
                round=round,
                rule=rule,
                mechanism=privacy.mode,
                noise_multiplier=release.noise_multiplier,
                sample_rate=release.sample_rate,
                steps=release.steps,
                accountant=privacy.accountant,
                delta=self._delta,
                epsilon=self._total(spent, release, privacy.accountant),
            ).chained(rows[-1].digest if rows else "")
            _append(connection, entry)
            connection.execute("COMMIT")
        ledger.testify(self._directory, entry)
        return entry

    def _check_declared(self, spent: list[Entry], release: Release, privacy: PrivacyConfig, run: str) -> None:
        """Refuse a release that would pass the run's own epsilon, which only a round tried again can."""
        releases = [*(row.release for row in spent if (row.node, row.run) == (self._node, run)), release]
        if not privacy.noise_multiplier and (
            accounting.epsilon(releases, privacy.delta, privacy.accountant) > privacy.epsilon
        ):
            raise RefusalError(
                "this run has cost the node what it said it would",
                where=f"{self._node}, privacy.epsilon",
                expected=f"at most epsilon {privacy.epsilon:g} at delta {privacy.delta:g} over the run",
                got="more with this round",
                cure="A round that was tried again was charged again.",
            )

    def _total(self, spent: list[Entry], release: Release, accountant: Accountant) -> float:
        """Epsilon with this release. Its figure stays here: the number of examples could be read from it."""
        total = accounting.epsilon([*(row.release for row in spent), release], self._delta, accountant)
        if self._epsilon and total > self._epsilon:
            raise RefusalError(
                "the privacy budget of this node is spent",
                where=f"{self._node}, privacy-epsilon",
                expected=f"at most epsilon {self._epsilon:g} at delta {self._delta:g} over all runs on its data",
                got="more with this round",
                cure="Its operator sees what was spent with `bouquet ledger show`.",
            )
        return total


def _register(connection: Connection, dataset: DataSet) -> set[str]:
    """Make the data set known; the fingerprints of all that share a record with it, its own among them."""
    connection.execute("INSERT OR IGNORE INTO dataset (fingerprint) VALUES (?)", (dataset.fingerprint,))
    (number,) = connection.execute("SELECT id FROM dataset WHERE fingerprint = ?", (dataset.fingerprint,)).fetchone()
    connection.executemany(
        "INSERT OR IGNORE INTO example VALUES (?, ?)", ((member, number) for member in sorted(dataset.members))
    )
    related = connection.execute(
        "SELECT DISTINCT fingerprint FROM example AS mine JOIN example AS other USING (digest)"
        " JOIN dataset ON dataset.id = other.dataset WHERE mine.dataset = ?",
        (number,),
    )
    return {fingerprint for (fingerprint,) in related}


def _append(connection: Connection, entry: Entry) -> None:
    values = astuple(entry)
    connection.execute(f"INSERT INTO release VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608
