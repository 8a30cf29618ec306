"""Kinds 7 and 8: the books of what was spent, read while others write, emptied, and put back."""

import shutil
import sqlite3

import pytest

from common.config.node import NodeConfig
from common.error import BouquetError
from tests.attacks.hostile import RECORDS, Node, failure, refused
from tests.attacks.tools import FORK, written


def books(node):
    """The file of the node's ledger."""
    (file,) = NodeConfig.from_flower(node.config).ledger.rglob("*.sqlite")
    return file


def execute(*statements):
    """Changes the ledger behind the node's back."""

    def change(node):
        with sqlite3.connect(books(node)) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return change


def emptied(node):
    """Every table of the ledger, whatever its name."""
    with sqlite3.connect(books(node)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            connection.execute(f'DELETE FROM "{table}"')
    connection.close()


def dropped(node):
    """No table left."""
    with sqlite3.connect(books(node)) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            connection.execute(f'DROP TABLE "{table}"')
    connection.close()


def removed(node):
    """The ledger's files without its folder."""
    for file in books(node).parent.glob("*.sqlite*"):
        file.unlink()


def swept(node):
    """The whole state directory."""
    shutil.rmtree(node.state)


def cut(node):
    """A file of no bytes."""
    file = books(node)
    removed(node)
    file.touch()


LOST = {
    "every table emptied": emptied,
    "every table dropped": dropped,
    "the file": removed,
    "the folder": swept,
    "cut": cut,
}


def test_a_witness_that_cannot_be_written_is_told_by_the_roll_call(tmp_path):
    """Not by a first round, in the middle of a run and charged."""
    (tmp_path / "file").write_text("")
    node = Node(tmp_path / "node", privacy_witness=str(tmp_path / "file" / "head"))
    answer = node.ask("query")
    assert refused(answer)
    assert "one of the node's folders cannot be written to" in failure(answer)


@pytest.mark.parametrize("loss", LOST)
def test_a_node_that_has_lost_its_books_stops(loss, tmp_path):
    node = Node(tmp_path / "node")
    assert failure(node.ask("train", round=0)) == ""
    LOST[loss](node)
    assert all(refused(node.ask("train", round=turn)) for turn in range(1, 3))


@pytest.mark.parametrize("what", ["state", "ledger"])
@pytest.mark.parametrize("later", [1, 2])
def test_a_node_whose_books_were_put_back_stops(what, later, tmp_path):
    """The machine's backup of the state directory, or of the ledger in it, is older than what left."""
    node = Node(tmp_path / "node")
    node.ask("train", round=0)
    backup = tmp_path / "backup"
    shutil.copytree(node.state, backup)
    for turn in range(later):
        assert failure(node.ask("train", round=1 + turn)) == ""
    name = books(node).relative_to(node.state)
    if what == "state":
        shutil.rmtree(node.state)
        shutil.copytree(backup, node.state)
    else:
        removed(node)
        shutil.copy(backup / name, node.state / name)
    assert refused(node.ask("train", round=9))


def test_a_node_that_forgot_whose_records_are_whose_does_not_start_afresh(tmp_path):
    node = Node(tmp_path / "node")
    node.ask("train")
    with sqlite3.connect(books(node)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table in tables - {"release"}:
            connection.execute(f'DELETE FROM "{table}"')
    connection.close()
    written(node.folder, [*RECORDS, {"text": "x = 1", "label": 0, "age": 1}], name="again")
    node.config["data"] = str(node.folder / "again.jsonl")
    answer = node.ask("train", round=1)
    assert refused(answer) or node.rows()[-1].epsilon > node.rows()[0].epsilon


def test_reading_beside_a_charger_sees_whole_books_and_disturbs_nobody(tmp_path):
    node = Node(tmp_path / "node")
    node.ask("train", round=0)
    charger = FORK.Process(target=lambda: [node.ask("train", round=turn) for turn in range(1, 9)])
    charger.start()
    seen, wrong = [], []
    while charger.is_alive():
        try:
            seen.append(len(node.rows()))
        except BouquetError as error:
            wrong.append(error)
    charger.join()
    assert not wrong
    assert seen == sorted(seen)
    assert len(node.rows()) == 9


def test_reading_makes_no_books(tmp_path):
    node = Node(tmp_path / "node")
    with pytest.raises(BouquetError):
        node.rows()
    assert not node.state.exists() or not list(node.state.rglob("*.sqlite"))
