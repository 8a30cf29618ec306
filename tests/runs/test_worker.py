"""The warm worker: the same answers as without it, from one process, which only its owner reaches."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from client_app import gpu, worker
from common.error import BouquetError
from tests.support.budgets import FORK
from tests.support.grid import run_in_process
from tests.support.outcome import failures
from tests.support.processes import holders, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "warm"
    yield folder
    worker.stop(folder)


def test_a_warm_node_gives_the_same_adapter_and_keeps_one_process(settings, tmp_path, state):
    warm = {"state-directory": str(state), "warm": 60.0}
    for name, own in (("cold", {}), ("warm", {0: warm})):
        run_in_process(settings(**{"run-name": name, "num-server-rounds": 1}), nodes=2, node_config=own)
    cold, kept = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("cold", "warm"))
    assert cold["adapter_digest"] == kept["adapter_digest"]
    (first,) = holders(state)
    assert first != os.getpid()
    assert (state / "worker.sock").stat().st_mode & 0o777 == 0o600
    log = (state / "worker.log").read_text()
    assert "Traceback" not in log

    worker.serve(state, 60.0)  # a second one ends itself
    assert holders(state) == [first]

    # Killed, it is started anew; told to stop, it is gone with its memory.
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: holders(state) == [], "the worker to die")
    once = {"run-name": "anew", "num-server-rounds": 1, "evaluation.every": 0}
    run_in_process(settings(**once), nodes=2, node_config={0: warm})
    assert failures(tmp_path / "anew") == []
    assert holders(state) != [first]
    worker.stop(state)
    wait_for(lambda: holders(state) == [], "the worker to end")
    assert not (state / "worker.sock").exists()


def test_an_idle_worker_ends(tmp_path):
    started = time.monotonic()
    worker.serve(tmp_path, 0.2)
    assert 0.2 <= time.monotonic() - started < 5
    assert not (tmp_path / "worker.sock").exists()


def test_a_state_directory_that_will_not_do_is_named(settings, tmp_path, capsys):
    somewhere = {"warm": 9.0, "state-directory": "here"}
    once = {"num-server-rounds": 1, "min-nodes": 1, "evaluation.every": 0}
    run_in_process(settings(**once), nodes=2, node_config={1: somewhere})
    (reason,) = failures(tmp_path / "run")
    assert "a config with mistakes; see this node's own log" in reason
    said = capsys.readouterr().err
    assert (
        "state-directory: expected an absolute path, since an app does not run in the folder it was started from"
        in said
    )
    deep = tmp_path / ("x" * 120)
    run_in_process(
        settings(**once, **{"run-name": "deep"}),
        nodes=2,
        node_config={1: {"warm": 9.0, "state-directory": str(deep)}},
    )
    assert "a path too long for a socket" in failures(tmp_path / "deep")[0]


def hold(held: Event) -> None:
    """Keep a GPU to the end of this process."""
    gpu.reserve("GPU-1", Path("/srv/ward-1"))
    held.set()
    signal.pause()


@pytest.fixture
def holder(tmp_path, monkeypatch) -> Iterator[ForkProcess]:
    """Another worker, a process of its own, which has the first GPU."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(held,))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_gpu_has_one_worker_and_is_free_when_that_is_killed(tmp_path, holder):
    with pytest.raises(
        BouquetError, match=rf"is using this GPU \(GPU-1\): got process {holder.pid}, /srv/ward-1. Give"
    ):
        gpu.reserve("GPU-1", tmp_path)
    gpu.reserve("GPU-2", tmp_path).close()
    assert gpu.identities(["cpu", "cpu"]) == []
    holder.kill()
    holder.join()
    gpu.reserve("GPU-1", tmp_path).close()
    gpu.reserve.cache_clear()
    assert {file.stat().st_mode & 0o077 for file in tmp_path.iterdir()} == {0}


def take_turn(name: str, may_start: Event, entered: Event) -> None:
    may_start.wait(60)
    with gpu.turn(name):
        entered.set()


def test_messages_of_two_runs_take_their_turns_on_one_gpu(tmp_path, monkeypatch):
    """Each in a process of its own, as Flower starts them; another GPU is not waited for."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    may_start, entered = FORK.Event(), {name: FORK.Event() for name in ("GPU-1", "GPU-2")}
    messages = [FORK.Process(target=take_turn, args=(name, may_start, event)) for name, event in entered.items()]
    for message in messages:
        message.start()
    with gpu.turn("GPU-1"):
        may_start.set()
        assert entered["GPU-2"].wait(60)
        assert not entered["GPU-1"].wait(0.5)
    assert entered["GPU-1"].wait(60)
    for message in messages:
        message.join(60)


def serve(state: Path) -> None:
    """A worker that finds a GPU, for which a CPU stands in."""
    gpu.identity = lambda device: "GPU-1"
    with (state / "worker.log").open("w") as sys.stderr:
        worker.serve(state, 60.0)


def test_a_worker_whose_gpu_is_taken_ends_and_says_so_in_its_log(settings, tmp_path, state, holder):
    state.mkdir()
    second = FORK.Process(target=serve, args=(state,))
    second.start()
    wait_for((state / "worker.sock").exists, "the second worker")
    once = {"num-server-rounds": 1, "min-nodes": 1, "evaluation.every": 0}
    node = {"state-directory": str(state), "warm": 60.0}
    run_in_process(settings(**once), nodes=2, node_config={1: node})
    second.join(60)
    assert second.exitcode == 0
    said = failures(tmp_path / "run")[0]
    assert "the worker ended before it answered" in said
    assert "GPU" not in said, "what a log holds may be the data's"
    told = (state / "worker.log").read_text()
    assert f"another worker is using this GPU (GPU-1): got process {holder.pid}, /srv/ward-1" in told
