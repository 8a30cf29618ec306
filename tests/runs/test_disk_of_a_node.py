"""A node's disk that is full: nothing is charged, sent or lost, and what lies there stays whole."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client_app import audit, worker
from client_app.budget import Budget, Limits
from client_app.memory import Memory
from common.adapter.values import Key
from common.config.node import NodeConfig
from common.error import DiskError, RefusalError
from server_app.run import conduct
from tests.support.budgets import DELTA, PRIVACY, RELEASE, charge, read
from tests.support.disks import fill, mount, of_at_most, unmounted_at_last
from tests.support.grid import RUN_ID, InProcessGrid
from tests.support.outcome import failures, rounds_of


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A node's state directory on a small disk of its own."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    mount("-t", "tmpfs", "-o", "size=256k,mode=700", "none", folder)
    with unmounted_at_last(folder):
        yield folder


def stuff(folder: Path) -> Path:
    """Leave a disk no room; the file that takes it."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(1024))
    return filler


def test_a_ledger_without_room_charges_nothing_and_stays_whole(small):
    """On a full disk, and on one that can only be read; a refusal for good it is not."""
    first = charge(small)
    filler = stuff(small)
    for _ in range(2):
        with pytest.raises(
            DiskError, match=r"the privacy ledger cannot be written \(.*ledger.sqlite\): got .*Make room"
        ):
            charge(small, round=1)
    filler.unlink()
    mount("-o", "remount,ro", small)
    with pytest.raises(DiskError, match=r"the privacy ledger cannot be written \(.*ledger.sqlite\): got .*Make room"):
        charge(small, round=1)
    mount("-o", "remount,rw", small)
    assert read(small) == [first]
    assert charge(small, round=1).number == 2


def test_a_witness_that_finds_no_room_stops_the_node_and_raises_no_alarm(tmp_path, small):
    witness, state = small / "head", tmp_path / "apart"
    own = Budget(state, witness, "ward-3", Limits(0.0, DELTA, 0.0))
    own.charge(RELEASE, PRIVACY, run="run", round=0, rule="fedit")
    filler = stuff(small)
    with pytest.raises(RefusalError, match=r"the witness of the privacy ledger cannot be written .*or make room there"):
        own.charge(RELEASE, PRIVACY, run="run", round=1, rule="fedit")
    filler.unlink()
    assert own.charge(RELEASE, PRIVACY, run="run", round=1, rule="fedit").number == 3, "the second row is paid for"


def test_what_a_node_keeps_is_that_of_before_where_there_is_no_room(small):
    memory = Memory(small, "run", "ward-3")
    memory.save("personal", {Key("l", "B"): torch.ones(1)}, 1)
    memory.clip = 2.0
    stuff(small)
    with pytest.raises(DiskError, match=r"what this node keeps cannot be written .*asked again in the next round"):
        memory.save("personal", {Key("l", "B"): torch.zeros(50000)}, 2)
    with pytest.raises(DiskError, match="what this node keeps cannot be written"):
        memory.clip = 3.0
    assert torch.equal(memory.load("personal", 2)[Key("l", "B")], torch.ones(1))
    assert memory.clip == 2.0


def test_what_is_not_in_the_audit_log_does_not_leave(settings, tmp_path):
    """One of two nodes finds no room for the line in the first round."""
    state = tmp_path / "ward"

    def make_room(content: RecordDict) -> RecordDict:
        if audit.path(state).is_symlink():
            audit.path(state).unlink()
        return content

    class Filled(InProcessGrid):
        def push_messages(self, messages):
            messages = list(messages)
            if messages[0].metadata.message_type == "train" and messages[0].metadata.group_id == "0":
                audit.path(state).rename(tmp_path / "before")
                fill(audit.path(state))
            return super().push_messages(messages)

    config = settings(**{"min-nodes": 1, "evaluation.every": 0})
    grid = Filled(config, 2, node_config={1: {"state-directory": str(state)}}, tamper={1: make_room})
    conduct(grid, Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    (reason,) = failures(tmp_path / "run")
    assert re.search(
        r"the audit log cannot be written \(.*audit.jsonl\): got No space left on device. Make room", reason
    )
    assert rounds_of(tmp_path / "run", "node-001") == [2]


def test_a_line_that_a_full_disk_has_cut_short_spoils_no_other(settings, tmp_path):
    (context,) = InProcessGrid(settings(), 1).contexts.values()
    node = NodeConfig.from_flower({**context.node_config, "state-directory": str(tmp_path / "state")})
    message = Message(RecordDict(), dst_node_id=1, message_type="query")
    audit.write(node, message, RecordDict(), "run", 0, None)
    size = audit.path(node.state).stat().st_size
    with of_at_most(size + 10), pytest.raises(DiskError, match=r"the audit log cannot be written .*No space left"):
        audit.write(node, message, RecordDict(), "run", 0, None)
    audit.write(node, message, RecordDict(), "run", 0, None)
    first, torn, last = audit.path(node.state).read_text().splitlines()
    assert json.loads(first)["message"] == json.loads(last)["message"] == "query"
    assert len(torn) == 10


def test_a_worker_that_cannot_be_started_is_told(settings, small):
    mount("-o", "remount,ro", small)
    (context,) = InProcessGrid(settings(), 1).contexts.values()
    message = Message(RecordDict(), dst_node_id=1, message_type="query")
    with pytest.raises(
        DiskError, match=r"what the worker needs cannot be written \(.*state\): got Read-only file system"
    ):
        worker.hand_over(message, context, small, 60.0)
