"""How a node's processes are started: a SuperNode with shorter waits, and tasks that are forked."""

import inspect
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from deploy import supernode
from deploy.bundles import forks
from tests.support import ROOT
from tests.support.processes import wait_for


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """How long the launcher's SuperNode has slept, each time."""
    seconds: list[float] = []
    monkeypatch.setattr(supernode.time, "sleep", seconds.append)
    return seconds


def test_the_release_whose_waits_are_known_is_the_one_that_is_installed():
    """Whoever raises Flower's version reads its loop again."""
    assert import_module("flwr").__version__ == supernode.KNOWN
    loop = inspect.getsource(import_module(supernode.LOOP))
    assert re.findall(r"\btime\.\w+\([^)]*\)", loop) == ["time.sleep(3)", "time.sleep(0.5)", "time.sleep(0.5)"]


def test_a_node_asks_often_after_a_reply_and_seldom_when_it_is_idle(slept):
    waits = supernode.Waits()
    for _ in range(400):
        waits.sleep(3)
    assert slept[0] == supernode.LEAST_SECONDS
    assert slept[-1] == 3
    for number, pause in enumerate(slept):
        assert pause <= max(supernode.LEAST_SECONDS, supernode.SHARE * sum(slept[:number])) + 1e-9
    assert len([pause for pause in slept if pause < 3]) < 100, "an idle node costs the SuperLink what Flower's does"
    waits.sleep(0.5)
    waits.sleep(3)
    assert slept[-2:] == [supernode.LOOK_SECONDS, supernode.LEAST_SECONDS]


@pytest.mark.parametrize("release", [supernode.KNOWN, "1.39.7"])
def test_another_release_keeps_its_own_waits_and_says_so(release, monkeypatch, capsys):
    loop, started = import_module(supernode.LOOP), []
    monkeypatch.setattr("flwr.__version__", release)
    monkeypatch.setattr(loop, "time", time)
    command = import_module("flwr.supernode.cli.flower_supernode")
    monkeypatch.setattr(command, "flower_supernode", lambda: started.append(loop.time))
    supernode.start()
    said = capsys.readouterr().err
    if release == supernode.KNOWN:
        assert isinstance(started[0], supernode.Waits)
        assert said == ""
    else:
        assert started == [time]
        assert said == ("bouquet: the waits of Flower 1.39.7 are unknown (known: 1.39.0) and are left unchanged\n")


FORKING = """
import os, random, signal, subprocess, sys
from pathlib import Path
import numpy as np
from deploy.bundles import forks
folder = Path(sys.argv[1])
pipe, command = forks.part()
if command:
    told = [str(os.getpid()), str(os.getppid()), str(random.random()), str(np.random.random()), *command]
    told.append(str(signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL))
    told.append(Path("/proc/self/comm").read_text())
    (folder / f"{command[1]}.part").write_text(" ".join(told))
    (folder / f"{command[1]}.part").rename(folder / command[1])
    sys.exit()
own = forks.Forks(pipe, "task", subprocess)
for name in ("one", "two"):
    own.Popen(["task", name])
own.Popen(["touch", str(folder / "another")]).wait()
sys.stdin.read()
"""


def test_tasks_are_forked_from_one_process_which_ends_with_its_starter(tmp_path):
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as starter:
        wait_for(lambda: all((tmp_path / name).exists() for name in ("one", "two")), "two tasks", 30)
        one, two = ((tmp_path / name).read_text().split() for name in ("one", "two"))
        assert (one[4:], two[4:]) == (["task", "one", "True", forks.TASK], ["task", "two", "True", forks.TASK])
        source = one[1]
        assert source == two[1]
        assert len({one[0], two[0], source, str(starter.pid)}) == 4
        assert len({*one[2:4], *two[2:4]}) == 4, "what one task draws, another does not"
        assert (tmp_path / "another").exists(), "what is no task is started as ever"
        starter.kill()
        wait_for(lambda: not Path(f"/proc/{source}").exists(), "the end of the process that forks", 30)


def test_where_nobody_forks_any_more_a_task_is_started_anew(tmp_path):
    code = f"""
import os, subprocess
from deploy.bundles import forks
reading, writing = os.pipe()
os.close(reading)
forks.Forks(writing, "touch", subprocess).Popen(["touch", {str(tmp_path / "task")!r}]).wait()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "task").exists()
