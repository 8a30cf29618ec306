"""The file of what the data has cost: nobody else touches it, and whatever is changed in it shows."""

import json
import os
import re
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from client_app.budget import Budget, Limits
from common import durable, owned
from common.config.node import witness_of
from common.error import BouquetError, RefusalError
from common.privacy import ledger
from common.privacy.ledger import DataSet
from tests.support.budgets import BROKEN, DELTA, FORK, NOTES, PRIVACY, RECORDS, RELEASE, charge, read, read_head


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


# Who can touch it


def test_only_the_operator_can_read_it(tmp_path):
    state = tmp_path / "made" / "state"
    before = os.umask(0)
    charge(state)
    os.umask(before)
    assert {folder.stat().st_mode & 0o777 for folder in (state, state.parent)} == {0o700}
    files = {file.name: file.stat().st_mode & 0o777 for file in state.parent.rglob("*") if file.is_file()}
    assert files == {"ledger.sqlite": 0o600, "ledger.lock": 0o600, "head": 0o600}


@pytest.mark.parametrize("name", ["state", "state/ledger.sqlite", "state/ledger.lock", "state.witness/head"])
@pytest.mark.parametrize("bit", [0o040, 0o020, 0o010, 0o004, 0o002, 0o001])
def test_what_others_may_touch_is_refused(name, bit, state):
    charge(state)
    file = state.parent / name
    file.chmod(file.stat().st_mode | bit)
    for act in (read, charge):
        with pytest.raises(
            RefusalError, match=r"private to one user .*got mode 0\d\d\d. Find out who changed it; then"
        ):
            act(state)


@pytest.mark.parametrize("name", ["state", "state/ledger.sqlite", "state/ledger.lock", "state.witness/head"])
def test_a_symbolic_link_is_refused(name, state):
    charge(state)
    file = state.parent / name
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))
    for act in (read, charge):
        with pytest.raises(RefusalError, match=r"private to one user is open .*got a symbolic link"):
            act(state)


def test_another_users_folder_is_refused_before_anything_is_made(state, monkeypatch):
    state.mkdir(mode=0o700)
    monkeypatch.setattr(owned.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RefusalError, match=r"private to one user is open .*got another user's"):
        charge(state)
    assert list(state.parent.iterdir()) == [state]
    assert not list(state.iterdir())


# What shows


def tampered(connection: sqlite3.Connection) -> list[str]:
    """Every change of one cell, every row less, every table emptied and every table gone."""
    changes = []
    for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        changes += [f"DELETE FROM {table}", f"DROP TABLE {table}"]
        columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
        for (row,) in connection.execute(f"SELECT rowid FROM {table}").fetchall():
            changes.append(f"DELETE FROM {table} WHERE rowid = {row}")
            for column in columns:
                (value,) = connection.execute(f"SELECT {column} FROM {table} WHERE rowid = {row}").fetchone()
                others = {
                    int: [f"{column} + 100"],
                    float: [f"{column} * 1.0001"],
                    str: [f"{column} || 'x'", "''"],
                    bytes: [
                        f"X'{value.hex()}00'",
                        f"X'{value[:16].hex()}{value.hex()}'",
                        f"X'{value[16:].hex()}'",
                        "X''",
                    ]
                    if isinstance(value, bytes)
                    else [],
                }[type(value)]
                changes += [f"UPDATE {table} SET {column} = {other} WHERE rowid = {row}" for other in others if value]
    return changes


def test_every_change_shows_and_stops_the_node(state):
    grown = DataSet.of([*RECORDS, {"text": "new"}], ["text"])
    for turn, dataset in enumerate((NOTES, None, grown, NOTES), start=1):
        charge(state, round=turn, dataset=dataset)
    with sqlite3.connect(ledger.path(state)) as connection:
        changes = tampered(connection)
    connection.close()
    assert len(changes) > 100
    unnoticed, said = [], set()
    for number, change in enumerate(changes):
        copy = state.with_name(f"copy-{number}")
        shutil.copytree(state, copy)
        shutil.copytree(witness_of(state).parent, witness_of(copy).parent)
        with sqlite3.connect(ledger.path(copy)) as connection:
            connection.execute(change)
        connection.close()
        for act in (read, charge, lambda folder: charge(folder, dataset=DataSet.of([{"text": "else"}], ["text"]))):
            try:
                act(copy)
                unnoticed.append(change)
            except RefusalError as error:
                said.add((str(error).startswith(BROKEN), str(error).endswith(ledger.LOST)))
    assert not unnoticed
    assert said == {(True, True)}


def test_a_file_that_is_no_database_stops_the_node(state):
    charge(state)
    ledger.path(state).write_bytes(b"x" * 5000)
    with pytest.raises(RefusalError, match=r"the privacy ledger cannot be read .*got file is not a database. What was"):
        charge(state)


@pytest.mark.parametrize("lost", ["the file", "the folder"])
def test_a_ledger_that_is_gone_stops_the_node(lost, state):
    charge(state)
    shutil.rmtree(state) if lost == "the folder" else ledger.path(state).unlink()
    for act in (read, charge):
        with pytest.raises(
            RefusalError, match=r"ledger.sqlite, row 1\): expected digest .*, got 0 rows. What was spent"
        ):
            act(state)


def test_an_older_backup_stops_the_node_and_is_not_what_is_advised(state):
    charge(state)
    shutil.copytree(state, state.with_name("backup"))
    charge(state)
    shutil.rmtree(state)
    state.with_name("backup").rename(state)
    with pytest.raises(
        RefusalError, match=r"row 2\): expected digest .*, got 1 rows. .*older copy forgets what"
    ) as error:
        charge(state)
    assert "estore" not in str(error.value)


def test_a_ledger_that_went_another_way_since_shows(state):
    charge(state)
    shutil.copytree(state, state.with_name("backup"))
    charge(state)
    witness = witness_of(state).read_text()
    shutil.rmtree(state)
    state.with_name("backup").rename(state)
    witness_of(state).write_text("1 " + read_head(state, 1))
    charge(state, run="another")
    witness_of(state).write_text(witness)
    with pytest.raises(RefusalError, match=r"row 2\): expected digest [0-9a-f]{16}, got digest [0-9a-f]{16}"):
        read(state)


def test_rows_without_a_witness_stop_the_node_until_it_is_given_back(state, capsys):
    charge(state)
    charge(state)
    witness = witness_of(state)
    witness.unlink()
    for act in (read, charge):
        with pytest.raises(RefusalError, match=r"the witness of the privacy ledger is missing .*If it alone was lost"):
            act(state)
    assert not witness.exists()
    line = capsys.readouterr().err.splitlines()[-1]
    number, head = re.fullmatch(r"privacy budget: row (\d+), head (\w+)", line).groups()
    with os.fdopen(os.open(witness, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        file.write(f"{number} {head}\n")
    assert charge(state).number == 3


@pytest.mark.parametrize("text", ["", "2", "x y", "1 -", f"0 {'a' * 64}", "1 abcdef", f"-1 {'a' * 64}"])
def test_a_witness_that_says_nothing_stops_the_node(text, state):
    charge(state)
    witness_of(state).write_text(text)
    with pytest.raises(RefusalError, match=rf"{BROKEN} \(.*state.witness/head, the witness\): expected the number and"):
        charge(state)


def test_the_witness_lies_outside_the_folder(state):
    for witness in (state / "witness", state / "deep" / "witness"):
        with pytest.raises(RefusalError, match=r"lies in the folder that it guards .*expected a file outside"):
            Budget(state, witness, "ward", Limits(0, DELTA, 0)).charge(RELEASE, PRIVACY, run="r", round=0, rule="fedit")


def test_a_witness_that_cannot_be_written_stops_the_node_at_once(state):
    own = Budget(state, Path("/proc/nowhere/witness"), "ward-3", Limits(0, DELTA, 0))
    with pytest.raises(
        RefusalError, match=r"witness of the privacy ledger cannot be written .*got No such file .*Name a"
    ):
        own.charge(RELEASE, PRIVACY, run="r", round=0, rule="fedit")
    # A folder that is missing is made, for this user alone.
    witness = state.with_name("elsewhere") / "head"
    other = Budget(state, witness, "ward-3", Limits(0, DELTA, 0))
    assert other.charge(RELEASE, PRIVACY, run="r", round=0, rule="fedit").number == 1
    assert witness.parent.stat().st_mode & 0o777 == 0o700


def test_a_process_that_dies_between_row_and_witness_leaves_no_alarm(state, monkeypatch):
    charge(state)
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_testify", lambda witness, head: os.kill(os.getpid(), signal.SIGKILL))
        child = FORK.Process(target=charge, args=(state,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert witness_of(state).read_text().startswith("1 ")
    assert len(read(state)) == 2
    assert charge(state).number == 3
    assert witness_of(state).read_text() == f"3 {read_head(state, 3)}\n"


def test_a_process_that_dies_writing_the_witness_leaves_nothing_behind(state, monkeypatch):
    charge(state)
    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "replace", lambda old, new: os.kill(os.getpid(), signal.SIGKILL))
        for _ in range(3):
            child = FORK.Process(target=charge, args=(state,))
            child.start()
            child.join()
    charge(state)
    assert sorted(file.name for file in state.parent.iterdir()) == ["state", "state.witness"]


# Of a node of the edition before


def test_an_export_holds_what_is_needed_to_check_it_again(state):
    entry = charge(state)
    assert ledger.Entry(**json.loads(entry.to_json())) == read(state)[0]


def test_a_ledger_that_is_not_there_is_told_and_not_made(state):
    with pytest.raises(BouquetError, match=r"there is no ledger \(.*ledger.sqlite\). Name the node's state-directory"):
        read(state)
    assert not list(state.parent.iterdir())
    assert ledger.related(state, witness_of(state), None) == []
