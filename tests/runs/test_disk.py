"""A disk that is full, or turns read-only: one sentence, nothing finished is lost, and the run goes on afterwards.

What is written to ``/dev/full`` finds no space left; who may mount something also tries a folder that turns read-only.
"""

import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from common.record import checkpoint
from common.record.events import Stalled
from common.record.run import Run
from server_app.record import Record
from server_app.run import conduct
from strategies import read_config
from tests.support.budgets import DELTA, PRIVACY, RELEASE, charge, read
from tests.support.grid import RUN_ID, InProcessGrid, StubGrid
from tests.support.outcome import failures, lines, rounds_of

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
AGAIN = r"start again with resume = true\.$"


def fill(file: Path) -> None:
    """From here on a file takes nothing, whether it is open or still to be made."""
    with FULL.open("wb") as full:
        for descriptor in Path("/proc/self/fd").iterdir():
            if descriptor.is_symlink() and descriptor.readlink() == file:
                os.dup2(full.fileno(), int(descriptor.name))
                return
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(FULL)


@contextmanager
def of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows above so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount(*arguments: str | Path) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


@contextmanager
def unmounted_at_last(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that can no longer be written, though files in it are open."""
    mount("--bind", folder, folder)
    with unmounted_at_last(folder):
        mount("-o", "remount,ro,bind", folder)
        yield


class Then(StubGrid):
    """Two nodes; what is to happen when messages of a round go out, happens before them."""

    def __init__(self, then=lambda number: None) -> None:
        super().__init__(2)
        self._then = then

    def push_messages(self, messages):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == "train":
            self._then(int(messages[0].metadata.group_id) + 1)
        return super().push_messages(messages)


def run(settings, grid: StubGrid, **changes) -> None:
    config = settings(**{"num-server-rounds": 3, "evaluation.every": 0, **changes})
    conduct(grid, Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=config))


def digest(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["adapter_digest"]


@pytest.fixture(scope="module")
def unbroken() -> list[str]:
    """The digest of a run that nothing happened to, once there has been one."""
    return []


def goes_on(settings, folder: Path, unbroken: list[str], finished: list[int]) -> None:
    """The run is known to be broken off, has what it had finished, and ends as one that was not."""
    if not unbroken:
        run(settings, Then(), **{"run-name": "unbroken"})
        unbroken.append(digest(folder.with_name("unbroken")))
    assert checkpoint.rounds(folder / "checkpoints") == finished
    run(settings, Then(), resume=True)
    assert Run.read(folder).state == "finished"
    merged = [line["round"] for line in lines(folder) if line["phase"] == "merge"]
    assert merged == [1, 2, 3]
    assert digest(folder) == unbroken[0]


FILES = {
    "metrics.jsonl": ("the record of a run cannot be written", [1]),
    "run.log": ("the log of a run cannot be written", [1, 2]),
    "adapter/adapter_config.json": ("the adapter cannot be written", [1, 2, 3]),
    "adapter/bouquet.json": ("the adapter cannot be written", [1, 2, 3]),
    "summary.json.building": ("the summary of a run cannot be written", [1, 2, 3]),
}
"""What a full disk may meet from the second round on, what is said of it, and the rounds that are finished then."""


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on(name, settings, tmp_path, unbroken):
    file, (said, finished) = tmp_path / "run" / name, FILES[name]
    grid = Then(lambda number: fill(file) if number == 2 else None)
    with pytest.raises(DiskError, match=rf"^{said} \({tmp_path}/run.*\): got .*No space left on device.*{AGAIN}"):
        run(settings, grid)
    if file.is_symlink():
        file.unlink()
    goes_on(settings, tmp_path / "run", unbroken, finished)


def test_a_spool_without_room_ends_in_a_sentence(settings, tmp_path, unbroken):
    limit = ExitStack()
    grid = Then(lambda number: limit.enter_context(of_at_most(24 * 4096)) if number == 2 else None)
    with limit, pytest.raises(DiskError, match=rf"the updates of a round cannot be written .*too large.*{AGAIN}"):
        run(settings, grid)
    assert not (tmp_path / "run/spool").exists()
    goes_on(settings, tmp_path / "run", unbroken, [1])


@pytest.mark.parametrize(
    ("room", "finished"), [("800k", []), ("1300k", [1]), ("1800k", [1, 2])], ids=["none", "one round", "two rounds"]
)
def test_a_disk_with_room_for_some_rounds_ends_in_a_sentence(room, finished, settings, tmp_path, unbroken):
    """The updates of two nodes take a megabyte, and a checkpoint half of one."""
    (tmp_path / "run").mkdir()
    mount("-t", "tmpfs", "-o", f"size={room}", "none", tmp_path / "run")
    with unmounted_at_last(tmp_path / "run"):
        with pytest.raises(DiskError, match=rf"the updates of a round .*: got No space left on device.*{AGAIN}"):
            run(settings, Then())
        mount("-o", "remount,size=64m", tmp_path / "run")
        goes_on(settings, tmp_path / "run", unbroken, finished)


@pytest.mark.parametrize(
    ("name", "said", "finished"),
    [
        ("", "a checkpoint cannot be written", [1]),
        ("checkpoints", "a checkpoint cannot be written", [1]),
        ("adapter", "the adapter cannot be written", [1, 2, 3]),
    ],
)
def test_a_folder_that_turns_read_only_ends_in_a_sentence(name, said, finished, settings, tmp_path, unbroken):
    folder, mounts = tmp_path / "run" / name, ExitStack()

    def shut(number: int) -> None:
        if number == 2:
            folder.mkdir(exist_ok=True)
            mounts.enter_context(read_only(folder))

    with mounts, pytest.raises(DiskError, match=rf"{said} \(.*\): got .*Read-only file system.*{AGAIN}"):
        run(settings, Then(shut))
    goes_on(settings, tmp_path / "run", unbroken, finished)


def test_a_full_disk_at_the_start_is_told_and_leaves_the_run_as_it_was(settings, tmp_path, unbroken):
    """The config of a run that is gone on with is the old one or the new one, and never half of it."""
    with pytest.raises(DiskError, match="the log of a run cannot be written"):
        run(settings, Then(lambda number: fill(tmp_path / "run/run.log") if number == 2 else None))
    before = (tmp_path / "run/config.json").read_text()
    (tmp_path / "run/config.json.building").symlink_to(FULL)
    with pytest.raises(DiskError, match=rf"the record of a run cannot be written .*No space left.*{AGAIN}"):
        run(settings, Then(), resume=True)
    assert (tmp_path / "run/config.json").read_text() == before
    goes_on(settings, tmp_path / "run", unbroken, [1, 2])


def test_a_run_directory_that_cannot_be_made_is_told(settings):
    with pytest.raises(DiskError, match=r"a run directory cannot be written \(/proc/runs/run\): got .*or run-name"):
        run(settings, Then(), **{"run-directory": "/proc/runs"})


def test_a_report_that_finds_no_room_is_told_and_the_run_is_complete(settings, tmp_path, capsys):
    run(settings, Then(lambda number: fill(tmp_path / "run/report.html.building") if number == 2 else None))
    said = capsys.readouterr().out
    assert (
        f"the report cannot be written ({tmp_path}/run/report.html): got No space left on device. bouquet rep" in said
    )
    assert Run.read(tmp_path / "run").state == "finished"


def test_who_is_told_of_a_runs_end_hears_of_a_full_disk(settings, tmp_path, heard):
    def go() -> None:
        with Record(read_config(settings()), 1) as record:
            fill(tmp_path / "run/metrics.jsonl")
            record.event(Stalled(round=1, said="it ended where it began"))

    with pytest.raises(DiskError, match="the record of a run cannot be written"):
        go()
    assert [told["text"] for told in heard] == ["run run: stopped: broken off"]


# On a node


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
