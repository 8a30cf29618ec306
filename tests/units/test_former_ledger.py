"""A ledger of the edition before: it counts in full, and a change in it shows."""

import sqlite3

import pytest

from common import durable, owned
from common.config.node import witness_of
from common.error import RefusalError
from common.privacy import ledger
from tests.support.budgets import BROKEN, DELTA, NOTES, charge, cost, read, read_head

FORMER = """
CREATE TABLE release (
    number INTEGER PRIMARY KEY, time TEXT NOT NULL, dataset TEXT NOT NULL, node TEXT NOT NULL, run TEXT NOT NULL,
    round INTEGER NOT NULL, rule TEXT NOT NULL, mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL, steps INTEGER NOT NULL, accountant TEXT NOT NULL, delta REAL NOT NULL,
    epsilon REAL NOT NULL, digest TEXT NOT NULL
) STRICT;
CREATE TABLE dataset (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE example (
    digest BLOB NOT NULL, dataset INTEGER NOT NULL REFERENCES dataset, PRIMARY KEY (digest, dataset)
) STRICT, WITHOUT ROWID;
INSERT INTO dataset VALUES (1, 'FINGERPRINT');
INSERT INTO example VALUES (X'00112233445566778899aabbccddeeff', 1);
"""


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def former(state):
    """A state directory of the edition before, with two rows."""
    state.mkdir(mode=0o700)
    rows, previous = [], ""
    for number in (1, 2):
        row = ledger.Entry(
            number, "2026-01-01T00:00:00Z", "f" * 64, "ward-3", "old", number - 1, "fedit", "example",
            2.0, 0.05, 10, "rdp", DELTA, cost(number),
        ).chained(previous)  # fmt: skip
        previous = row.digest
        rows.append(row)
    owned.make_file(ledger.path(state))
    with sqlite3.connect(ledger.path(state)) as connection:
        connection.executescript("PRAGMA journal_mode = WAL;" + FORMER.replace("FINGERPRINT", "f" * 64))
        for row in rows:
            connection.execute(f"INSERT INTO release VALUES ({', '.join('?' * 15)})", list(vars(row).values()))
    connection.close()
    durable.write(state / "ledger.witness", f"2 {previous}\n", durable.PRIVATE)
    return state


def test_a_ledger_of_the_edition_before_counts_in_full_for_whatever_data(former):
    assert len(read(former)) == 2
    with pytest.raises(RefusalError, match="the privacy budget of this node is spent"):
        charge(former, releases=2)
    # It knew records by digests that no record has any more.
    assert charge(former, releases=3, dataset=NOTES).epsilon == cost(3)
    assert sorted(file.name for file in former.iterdir()) == ["ledger.lock", "ledger.sqlite"]
    assert witness_of(former).read_text() == f"3 {read_head(former, 3)}\n"
    assert [row.run for row in read(former)] == ["old", "old", "run"]


def test_a_former_ledger_that_was_changed_or_cut_stops_the_node(former):
    with sqlite3.connect(ledger.path(former)) as connection:
        connection.execute("DELETE FROM release WHERE number = 2")
    connection.close()
    with pytest.raises(RefusalError, match=rf"{BROKEN} .*row 2\).*got 1 rows"):
        charge(former)
    (former / "ledger.witness").unlink()
    with pytest.raises(RefusalError, match="the witness of the privacy ledger is missing"):
        charge(former)
