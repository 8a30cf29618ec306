"""A disk that is full, or turns read-only: one sentence, nothing finished is lost, and the run goes on afterwards.

What is written to ``/dev/full`` finds no space left; who may mount something also tries a folder that turns read-only.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from common.error import DiskError
from common.record import checkpoint
from common.record.events import Stalled
from common.record.run import Run
from server_app.record import Record
from server_app.run import conduct
from strategies import read_config
from tests.support.disks import FULL, fill, mount, of_at_most, unmounted_at_last
from tests.support.grid import RUN_ID, StubGrid
from tests.support.outcome import lines

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
AGAIN = r"start again with resume = true\.$"


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
