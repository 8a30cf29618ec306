"""What the data of a node has cost, as a file: one row per release, chained by hashes so that changes are detected.

A node writes it (``client_app/budget.py``); its operator reads it (``bouquet ledger``). It belongs to the node, not to
a run, so that runs and restarts compose. Outside its folder lies the *witness*, the number and the digest of a row that
was there: a ledger that lost its last rows, or its whole folder, would else look like a young one.

Rows only grow, and a row is on the disk before the witness speaks of it. So whoever reads the witness first and the
rows after it finds the witness's row among them, whatever is written meanwhile and wherever a writer is killed. Writers
take turns by a lock on a file, which covers row and witness, so that a witness never goes back.
"""

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

from common import durable, owned
from common.error import BouquetError, DiskError, RefusalError
from common.privacy.accounting import Accountant, Release
from common.privacy.dataset import DataSet as DataSet

WAIT_SECONDS = 600.0
# What SQLite says of a disk that is full, fails, or cannot be written, in the low byte of its codes.
OF_THE_DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}

# The members of a data set lie beside the rows; its fingerprint, which is in the rows, proves them.
SCHEMA = """
CREATE TABLE IF NOT EXISTS release (
    number INTEGER PRIMARY KEY, time TEXT NOT NULL, dataset TEXT NOT NULL, node TEXT NOT NULL, run TEXT NOT NULL,
    round INTEGER NOT NULL, rule TEXT NOT NULL, mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL, steps INTEGER NOT NULL, accountant TEXT NOT NULL, delta REAL NOT NULL,
    epsilon REAL NOT NULL, digest TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS records (fingerprint TEXT PRIMARY KEY, digests BLOB NOT NULL) STRICT;
DROP TABLE IF EXISTS example;
DROP TABLE IF EXISTS dataset;
"""

LOST = (
    "What was spent is no longer known, and an older copy forgets what was spent since. Treat the budget as spent for "
    "this data; start a new state directory only for data that no run has seen."
)


@dataclass(frozen=True)
class Entry:
    """One row. ``epsilon`` is what had been spent with it, at ``delta``, of the budget that it was charged to.

    ``run`` and ``round`` are those of the run's own record. ``dataset`` is a fingerprint, empty where the release was
    of whatever data the node has; ``digest`` covers the row and, through the digest before it, every earlier one.
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
    accountant: Accountant
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


@dataclass(frozen=True)
class Head:
    """Number and digest of a ledger's newest row; 0 and nothing before the first."""

    number: int = 0
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.number} {self.digest or '-'}"


@dataclass(frozen=True)
class Book:
    """A ledger as it was at one moment, checked: its rows, and the data sets that some of them are about."""

    entries: list[Entry]
    datasets: Mapping[str, DataSet]

    @property
    def head(self) -> Head:
        """Its newest row."""
        return Head(self.entries[-1].number, self.entries[-1].digest) if self.entries else Head()

    def counting(self, dataset: DataSet | None) -> list[Entry]:
        """The rows that a release about ``dataset`` adds to: all but those that share no record with it for certain.

        A row without a data set, or with one that was known by other fields, may be about any record.
        """
        apart = {name for name, own in self.datasets.items() if dataset and own.apart(dataset)}
        return [entry for entry in self.entries if entry.dataset not in apart]


def path(directory: Path) -> Path:
    """The ledger's file in a node's state directory."""
    return directory / "ledger.sqlite"


def existing(directory: Path, witness: Path) -> Book:
    """The whole ledger, checked as :func:`load` does. Raises :class:`BouquetError` where there is no ledger, too."""
    if not path(directory).exists() and not witness.exists():
        deeper = sorted(str(file.parent) for file in directory.glob("*/ledger.sqlite"))
        raise BouquetError(
            "there is no ledger",
            where=str(path(directory)),
            cure=f"Name the node's: --directory {deeper[0]}" if deeper else "Name the node's state-directory.",
        )
    return load(directory, witness)


def read(directory: Path, witness: Path) -> list[Entry]:
    """Every entry of a ledger that :func:`existing` finds."""
    return existing(directory, witness).entries


def related(directory: Path, witness: Path, dataset: DataSet | None) -> list[Entry]:
    """The rows that a release about ``dataset`` would add to; none without a ledger. Raises as :func:`load` does."""
    return load(directory, witness).counting(dataset)


def load(directory: Path, witness: Path) -> Book:
    """The whole ledger, empty where there is none, and nothing made. Needs no lock.

    Raises :class:`RefusalError` where a row, a data set or the witness was changed or is missing, and where anybody
    but this user could have done it.
    """
    _check_places(directory, witness)
    known = _witness(witness) or _witness(_former(directory))
    book = _book(path(directory))
    if book.entries and known is None:
        if witness.exists():
            # The first charge of all came between the two readings.
            return load(directory, witness)
        raise RefusalError(
            "the witness of the privacy ledger is missing",
            where=str(witness),
            expected=f"the number and the digest of a row of {path(directory)}",
            got="no such file",
            cure="If it is elsewhere, name it (privacy-witness, --witness). If it alone was lost, write `N D` into "
            "it (mode 0600), from the newest line `privacy budget: row N, head D` in this machine's journal. Else: "
            f"{LOST}",
        )
    if known and known.number:
        number = known.number
        if number > len(book.entries):
            raise _broken(path(directory), f"row {number}", f"digest {known.digest[:16]}", f"{len(book.entries)} rows")
        if not (found := book.entries[number - 1].digest).startswith(known.digest):
            raise _broken(path(directory), f"row {number}", f"digest {known.digest[:16]}", f"digest {found[:16]}")
    return book


def append(directory: Path, witness: Path, head: Head, entry: Entry, dataset: DataSet | None) -> bool:
    """Write a row for good, and the witness after it; False, and nothing written, where ``head`` is no longer newest.

    What takes long is done before: nothing here but the disk is waited for under the lock.
    """
    owned.make_folder(directory)
    _check_places(directory, witness)
    with owned.locked(directory / "ledger.lock"):
        owned.make_file(path(directory))
        with _connect(path(directory)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            if _newest(connection) != head:
                return False
            if not owned.check(witness):
                # Before the first row: from here on rows without a witness show that somebody took it away.
                _testify(witness, head)
            connection.executescript(SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            if dataset:
                kept = dataset.fingerprint, dataset.digests
                connection.execute("INSERT OR IGNORE INTO records VALUES (?, ?)", kept)
            values = astuple(entry)
            connection.execute(f"INSERT INTO release VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608
            connection.execute("COMMIT")
        _testify(witness, Head(entry.number, entry.digest))
        _former(directory).unlink(missing_ok=True)
    return True


def _check_places(directory: Path, witness: Path) -> None:
    if directory.absolute() in witness.absolute().parents:
        raise RefusalError(
            "the witness of the privacy ledger lies in the folder that it guards",
            where=str(witness),
            expected=f"a file outside {directory}",
        )
    for each in (directory, path(directory), directory / "ledger.lock", witness):
        owned.check(each)


def _former(directory: Path) -> Path:
    """Where an earlier edition kept the witness. The first charge of this one carries it over."""
    return directory / "ledger.witness"


def _witness(file: Path) -> Head | None:
    if not owned.check(file):
        return None
    said = re.fullmatch(r"(\d{1,18}) ([0-9a-f]{16,64}|-)\s*", file.read_text(encoding="utf-8", errors="replace"))
    if not said or (said[1] == "0") != (said[2] == "-"):
        raise _broken(file, "the witness", "the number and the digest of a row", "something else")
    return Head(int(said[1]), said[2].strip("-"))


def _testify(witness: Path, head: Head) -> None:
    try:
        if not witness.parent.exists():
            owned.make_folder(witness.parent)
        durable.write(witness, f"{head}\n", durable.PRIVATE)
    except OSError as error:
        raise RefusalError(
            "the witness of the privacy ledger cannot be written",
            where=str(witness),
            got=error.strerror or str(error),
            cure="Name a file in a folder that the node may write to, outside its state directory, or make room there.",
        ) from error


def _newest(connection: sqlite3.Connection) -> Head:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'release'").fetchone():
        return Head()
    row = connection.execute("SELECT number, digest FROM release ORDER BY number DESC LIMIT 1").fetchone()
    return Head(*row) if row else Head()


def _book(file: Path) -> Book:
    """Rows and data sets of one moment, and no row that does not follow from the one before it."""
    if not owned.check(file):
        return Book([], {})
    with _connect(file) as connection:
        connection.execute("BEGIN")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        names = ", ".join(field.name for field in fields(Entry))
        rows = connection.execute(f"SELECT {names} FROM release ORDER BY number") if "release" in tables else ()  # noqa: S608
        entries = [Entry(*row) for row in rows]
        kept = dict(connection.execute("SELECT fingerprint, digests FROM records") if "records" in tables else ())
    previous = ""
    for number, entry in enumerate(entries, start=1):
        if entry.number != number or entry.chained(previous) != entry:
            raise _broken(file, f"row {number}", "the row that was written", "a changed or missing one")
        previous = entry.digest
    # An earlier edition knew data sets by digests that no record has any more; its rows count for every data set.
    datasets = {name: DataSet.stored(name, kept.get(name, b"")) for entry in entries if ":" in (name := entry.dataset)}
    for name, dataset in datasets.items():
        if dataset.fingerprint != name or dataset.digests != kept.get(name):
            raise _broken(file, f"data set {name}", "the records that were written", "changed or missing ones")
    return Book(entries, datasets)


@contextmanager
def _connect(file: Path) -> Iterator[sqlite3.Connection]:
    """The database, which is there; every commit is on the disk. Raises :class:`DiskError` where it is full."""
    try:
        uri = f"{file.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, WAIT_SECONDS, isolation_level=None, uri=True)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", 0) & 0xFF in OF_THE_DISK
        kind, done, cure = (DiskError, "written", durable.OF_A_NODE) if full else (RefusalError, "read", LOST)
        raise kind(f"the privacy ledger cannot be {done}", where=str(file), got=str(error), cure=cure) from error


def _broken(file: Path, row: str, expected: str, got: str) -> RefusalError:
    return RefusalError(
        "the privacy ledger differs from what was written",
        where=f"{file}, {row}",
        expected=expected,
        got=got,
        cure=LOST,
    )
