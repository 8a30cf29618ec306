"""The privacy ledger as a file: one row a release, chained by hashes so that a change shows.

A node writes it (``client_app/ledger.py``); its operator reads it (``bouquet ledger``). It belongs to the node, not to
a run, and is keyed by data set, so that runs and restarts compose. Beside it lies the *witness*, the number and the
digest of a row that was there: a ledger that lost its last rows, or all of them, would else look like a young one.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.accounting import Release
from common.error import BouquetError, RefusalError

# Nodes of a simulation share one ledger, and a charge takes a second where the accountant is slow.
WAIT_SECONDS = 600.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS release (
    number INTEGER PRIMARY KEY, time TEXT NOT NULL, dataset TEXT NOT NULL, node TEXT NOT NULL, run TEXT NOT NULL,
    round INTEGER NOT NULL, rule TEXT NOT NULL, mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL, steps INTEGER NOT NULL, accountant TEXT NOT NULL, delta REAL NOT NULL,
    epsilon REAL NOT NULL, digest TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS dataset (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE IF NOT EXISTS example (
    digest BLOB NOT NULL, dataset INTEGER NOT NULL REFERENCES dataset, PRIMARY KEY (digest, dataset)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True)
class DataSet:
    """A data set as the ledger knows it: a digest (16 bytes) of each different record, and the digest of them all.

    Neither the order of the records and their fields nor the form of their file matters. Two data sets that share a
    record share what was spent: a set that grew by one record does not start afresh.
    """

    members: frozenset[bytes]
    fingerprint: str

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> "DataSet":
        """The data set of these records, as they were read and before anything in the run config touches them."""
        members = frozenset(
            hashlib.sha256(json.dumps(record, sort_keys=True, default=repr).encode()).digest()[:16]
            for record in records
        )
        return cls(members, fingerprint_of(sorted(members)))


@dataclass(frozen=True)
class Entry:
    """One row. ``epsilon`` is what the examples of ``dataset`` have cost with it, at ``delta``, over all runs.

    ``dataset`` is a fingerprint; ``digest`` covers the row and, through the digest before it, every earlier one.
    """

    number: int
    time: str
    dataset: str
    node: str
    run: str
    round: int
    rule: str
    mechanism: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    accountant: str
    delta: float
    epsilon: float
    digest: str = ""

    @property
    def release(self) -> Release:
        """What the row says was given away."""
        return Release(self.noise_multiplier, self.sample_rate, self.steps)

    def chained(self, previous: str) -> "Entry":
        """The entry with its digest, given the digest of the row before it (``""`` for the first)."""
        content = json.dumps([previous, *astuple(replace(self, digest=""))])
        return replace(self, digest=hashlib.sha256(content.encode()).hexdigest())

    def to_json(self) -> str:
        """The entry as one line of JSON."""
        return json.dumps(asdict(self))


def path(directory: Path) -> Path:
    """The ledger's file in a node's state directory."""
    return directory / "ledger.sqlite"


def read(directory: Path) -> list[Entry]:
    """Every entry, after the check of :func:`entries` and one of the data sets behind them.

    Raises :class:`BouquetError` where there is no ledger, or it was changed.
    """
    file = path(directory)
    if not file.exists() and not _witness(directory).exists():
        raise BouquetError("there is no ledger", where=str(file), cure="Name the node's state-directory.")
    with connect(directory) as connection:
        for number, fingerprint in connection.execute("SELECT id, fingerprint FROM dataset").fetchall():
            members = connection.execute("SELECT digest FROM example WHERE dataset = ? ORDER BY digest", (number,))
            if fingerprint_of(digest for (digest,) in members) != fingerprint:
                raise _broken(directory, "data set", fingerprint[:16], "other examples")
        return entries(connection, directory)


def related(directory: Path, dataset: DataSet) -> list[Entry]:
    """The entries that the records of ``dataset`` have paid for, as part of whatever data set; none without a ledger.

    Raises :class:`BouquetError` where the ledger was changed.
    """
    if not path(directory).exists() and not _witness(directory).exists():
        return []
    spent = read(directory)
    with connect(directory) as connection:
        members = connection.execute("SELECT digest, fingerprint FROM example JOIN dataset ON id = dataset")
        shared = {fingerprint for digest, fingerprint in members if digest in dataset.members}
    return [entry for entry in spent if entry.dataset in shared]


def fingerprint_of(members: Iterable[bytes]) -> str:
    """The fingerprint of a data set from the digests of its records, in order."""
    return hashlib.sha256(b"".join(members)).hexdigest()


@contextmanager
def connect(directory: Path) -> Iterator[sqlite3.Connection]:
    """The database, made if it is not there, of mode 0600 in a folder of mode 0700; every commit is on the disk."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path(directory), os.O_CREAT | os.O_RDWR, 0o600))
    connection = sqlite3.connect(path(directory), timeout=WAIT_SECONDS, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(SCHEMA)
        yield connection
    finally:
        connection.close()


def entries(connection: sqlite3.Connection, directory: Path) -> list[Entry]:
    """Every entry, in order. Raises :class:`RefusalError` if a row was changed or removed."""
    names = ", ".join(field.name for field in fields(Entry))
    rows = [Entry(*row) for row in connection.execute(f"SELECT {names} FROM release ORDER BY number")]  # noqa: S608
    previous = ""
    for number, entry in enumerate(rows, start=1):
        if entry.number != number or entry.chained(previous) != entry:
            raise _broken(directory, f"row {number}", "the row that was written", "a changed or missing one")
        previous = entry.digest
    witness = _witness(directory)
    if witness.exists():
        number, digest = int(witness.read_text().split()[0]), witness.read_text().split()[1]
        if number > len(rows) or rows[number - 1].digest != digest:
            got = "another one" if number <= len(rows) else f"{len(rows)} rows"
            raise _broken(directory, f"row {number}", f"the row of digest {digest[:16]}", got)
    return rows


def testify(directory: Path, entry: Entry) -> None:
    """Make ``entry`` the witness, after it is in the ledger."""
    building = _witness(directory).with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(building, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        file.write(f"{entry.number} {entry.digest}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(building, _witness(directory))


def _witness(directory: Path) -> Path:
    return directory / "ledger.witness"


def _broken(directory: Path, row: str, expected: str, got: str) -> RefusalError:
    return RefusalError(
        "the privacy ledger is not as it was written",
        where=f"{path(directory)}, {row}",
        expected=expected,
        got=got,
        cure="What was spent is no longer known. Restore the newest backup that holds this row.",
    )
