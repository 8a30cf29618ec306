"""The budget among processes: killed at any instant, and read beside others that write."""

import fcntl
import os
import random
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from common.config.node import witness_of
from common.error import RefusalError
from common.privacy import accounting, ledger
from tests.support.budgets import FORK, NOTES, charge, cost, read


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


# Processes at once


def test_whoever_reads_while_others_write_reads_the_witness_first(state, monkeypatch):
    charge(state)
    found = ledger._book

    def charged_around(file: Path) -> ledger.Book:
        with monkeypatch.context() as patched:
            patched.setattr(ledger, "_book", found)
            charge(state)
            book = found(file)
            charge(state)
        return book

    monkeypatch.setattr(ledger, "_book", charged_around)
    assert len(read(state)) == 2


def test_whoever_reads_while_the_first_row_is_written_raises_no_alarm(state, monkeypatch):
    found = ledger._witness

    def charged_after(file: Path) -> ledger.Head | None:
        known = found(file)
        if file == witness_of(state) and known is None:
            with monkeypatch.context() as patched:
                patched.setattr(ledger, "_witness", found)
                charge(state)
        return known

    monkeypatch.setattr(ledger, "_witness", charged_after)
    assert len(ledger.load(state, witness_of(state)).entries) == 1


def held(directory: Path) -> bool:
    """Whether somebody holds the lock of the writers."""
    handle = os.open(directory / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_the_witness_is_written_under_the_lock_and_epsilon_is_not(state, monkeypatch):
    charge(state)
    testify, epsilon, seen = ledger._testify, accounting.epsilon, []
    monkeypatch.setattr(ledger, "_testify", lambda *a: (seen.append(("witness", held(state))), testify(*a)))
    monkeypatch.setattr(accounting, "epsilon", lambda *a: (seen.append(("epsilon", held(state))), epsilon(*a))[1])
    charge(state)
    assert set(seen) == {("witness", True), ("epsilon", False)}


def test_what_another_spent_while_this_one_computed_is_counted(state, monkeypatch):
    charge(state, releases=2)
    append, raced = ledger.append, []

    def beaten(*arguments):
        if not raced:
            raced.append(True)
            charge(state, releases=2, run="another")
        return append(*arguments)

    monkeypatch.setattr(ledger, "append", beaten)
    with pytest.raises(RefusalError, match="the privacy budget of this node is spent"):
        charge(state, releases=2)
    assert [row.run for row in read(state)] == ["run", "another"]


def charge_for_ever(directory: Path) -> None:
    while True:
        charge(directory, dataset=NOTES)


@pytest.mark.parametrize(
    ("reads", "chargers"),
    [(300, 3), pytest.param(10_000, 5, marks=pytest.mark.exhaustive)],
)
def test_reads_beside_chargers_raise_no_alarm(reads, chargers, state):
    """Two in five did, where the witness was read after the rows and written by whoever came last."""
    cost(1)
    children = [FORK.Process(target=charge_for_ever, args=(state,)) for _ in range(chargers)]
    for child in children:
        child.start()
    numbers, rows = [0], 0
    for _ in range(reads):
        if rows > 200:  # so that a read stays short
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
                child.join()
            state = state.with_name(f"state-{len(numbers)}")
            numbers, rows = [0], 0
            children = [FORK.Process(target=charge_for_ever, args=(state,)) for _ in range(chargers)]
            for child in children:
                child.start()
        rows = len(ledger.load(state, witness_of(state)).entries)
        if witness_of(state).exists():
            numbers.append(int(witness_of(state).read_text().split()[0]))
            assert numbers[-1] >= numbers[-2]
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert len(read(state)) >= numbers[-1]


def spend_until_refused(
    directory: Path, releases: int, released: Path, charge_first: bool = True, begun: Event | None = None
) -> None:
    """A node that charges, then lets an update go, for ever; a line in ``released`` is an update that left."""
    out = os.open(released, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    if begun:
        begun.set()
    while True:
        if not charge_first:
            os.write(out, b"sent\n")
        try:
            charge(directory, releases=releases)
        except RefusalError:
            os.write(out, b"refused\n")
            os._exit(0)
        if charge_first:
            os.write(out, b"sent\n")


def overspent_after(kills: int, folder: Path, releases: int, charge_first: bool = True) -> bool:
    """Kill a node at random instants and start it again; whether more left than was charged, or than the budget is.

    A node whose budget is spent makes way for another one.
    """
    draw, killed, node = random.Random(0), 0, 0
    charge(folder / "warm", releases=releases)  # what is cached before the fork need not be computed in each child
    while killed < kills:
        directory, released = folder / f"node-{node}", folder / f"released-{node}"
        begun = FORK.Event()
        child = FORK.Process(target=spend_until_refused, args=(directory, releases, released, charge_first, begun))
        child.start()
        begun.wait()
        time.sleep(draw.uniform(0.0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        node += child.exitcode == 0
    charged = 0
    for number in range(node + 1):
        directory, released = folder / f"node-{number}", folder / f"released-{number}"
        rows = read(directory) if ledger.path(directory).exists() else []
        sent = released.read_text().split().count("sent") if released.exists() else 0
        if sent > len(rows) or len(rows) > releases or any(row.epsilon > cost(releases) for row in rows):
            return True
        charged += len(rows)
    assert charged
    return False


@pytest.mark.slow
def test_killed_at_200_random_instants_it_never_overspends(tmp_path):
    assert not overspent_after(200, tmp_path, releases=40)


def test_a_node_that_charges_after_it_sends_would_be_found_out(tmp_path):
    assert overspent_after(40, tmp_path, releases=10, charge_first=False)


def test_two_processes_cannot_both_spend_the_last_release(tmp_path):
    for attempt in range(10):
        directory, released = tmp_path / str(attempt), tmp_path / f"released-{attempt}"
        charge(directory, releases=2)
        racers = [FORK.Process(target=spend_until_refused, args=(directory, 2, released)) for _ in range(2)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sorted(released.read_text().split()) == ["refused", "refused", "sent"]
        assert len(read(directory)) == 2


def test_processes_that_make_the_ledger_at_once_all_find_themselves_in_it(tmp_path):
    charge(tmp_path / "warm")
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        nodes = [FORK.Process(target=charge, args=(directory,)) for _ in range(6)]
        for node in nodes:
            node.start()
        for node in nodes:
            node.join()
        assert [node.exitcode for node in nodes] == [0] * 6
        assert len(read(directory)) == 6
