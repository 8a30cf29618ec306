"""A simulation in one program: the adapter of any other run, from processes that stay, and that may die."""

import os
import signal
from collections.abc import Iterator
from queue import Queue

import psutil
import pytest
from flwr.app import Message, MessageType, RecordDict

from client_app.link import pose
from common.error import BouquetError
from common.record.directory import Summary
from common.record.run import Run
from common.sources.stdlib import FAMILIES
from deploy.command import main
from deploy.simulation import one_program
from deploy.simulation.attempt import FLOWERS_LOG
from deploy.simulation.grid import COORDINATOR, simulated_nodes
from deploy.simulation.places import VISIBLE, places
from deploy.simulation.workers import Errand, Workers
from tests.support.grid import RUN_ID, run_in_process
from tests.support.processes import CORES, wait_for

NODES = 2


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Iterator[Workers]:
    """One process for all nodes, whose books are not the user's."""
    with pytest.MonkeyPatch.context() as patch, Workers(NODES, CORES, 0.0) as started:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield started


def processes() -> set[int]:
    """The processes that answer for nodes of this one."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return {child.pid for child in alive if "deploy.simulation.worker" in child.cmdline()}


@pytest.mark.slow
def test_runs_one_after_the_other_give_the_same_adapters_as_each_by_itself(workers, settings, tmp_path, capfd):
    """Of other rules, ranks and seeds; the processes stay, and a node is one of a simulation: it tells text."""
    once = {"num-server-rounds": 1, "evaluation.prompt": "def "}
    cells = {
        "fedit": {},
        "ravan": {"rule.name": "ravan", "lora.rank": 16, "seed": 1},
        "classes": {"task.name": "classify", "task.label": "family", "task.classes": ",".join(FAMILIES)},
    }
    answered_by = []
    for name, changes in cells.items():
        config = settings(**once, **changes, **{"run-name": name, "run-directory": ""})
        alone = config | {"run-directory": str(tmp_path / "alone"), "min-nodes": NODES}
        run_in_process(alone, NODES)
        assert one_program.simulate(workers, NODES, tmp_path / "kept", config, follow=name == "fedit") == 0
        first, again = (Summary.read(tmp_path / where / name) for where in ("alone", "kept"))
        assert first is not None
        assert again is not None
        assert again.adapter_digest == first.adapter_digest
        assert again.after == first.after
        answered_by.append(processes())
    assert answered_by == len(cells) * answered_by[:1]
    told = capfd.readouterr().out
    assert "round 1/1" in told
    assert "before:\n" in told, "a node of a simulation tells text"
    assert f"next: bouquet chat {tmp_path}/kept/fedit\n" in told
    assert "kept/ravan" not in told


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_of_its_node_and_replaced(workers, settings, tmp_path):
    pose(RUN_ID, COORDINATOR)
    (node, context), _ = simulated_nodes(RUN_ID, NODES, settings()).items()
    replies = Queue[Message]()

    def ask() -> None:
        message = Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
        workers.take(Errand(message, context, tmp_path / "log", replies.put))

    for process in processes():
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # dead, and left to be found so
    ask()
    wait_for(processes, "the process in its place", pause=0.01)
    os.kill(*processes(), signal.SIGKILL)  # which imports for seconds before it answers
    died = replies.get(timeout=60)
    assert died.has_error()
    assert f"the node's process ended before it answered ({tmp_path}/log): got exit code -9." in died.error.reason
    ask()
    answer = replies.get(timeout=60)
    assert answer.content.config_records["node"]["name"] == "node-000"


@pytest.mark.slow
def test_what_is_said_beside_a_run_that_fails_is_in_its_log(workers, settings, tmp_path, capfd):
    config = settings(**{"min-nodes": NODES + 1, "round.wait": 0.2})
    assert one_program.simulate(workers, NODES, tmp_path, config) == 3
    told = capfd.readouterr()
    log = tmp_path / "run" / FLOWERS_LOG
    assert "report: " in told.out
    assert told.err == (
        "bouquet: the run did not complete: too few nodes: expected 3 within 0.2 s (min-nodes, round.wait), got 2. "
        "Why others were left out is above; start more nodes, or a simulation with --nodes N.\n"
        f"The full log is in {log}.\n"
    )
    assert "Traceback" in log.read_text()
    assert not Run.read(tmp_path / "run").running


def test_an_option_that_the_machine_has_no_room_for_is_told(capsys, tmp_path):
    own = ["run", "--in-process", "--directory", str(tmp_path), "--cpus", str(CORES + 1)]
    assert main(own) == 2
    said = f"more per node than this machine has (--cpus): expected at most {CORES}, got {CORES + 1}"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gpus", "seen"), [(0.5, ["4", "4", "7", "7"]), (0.3, 3 * ["4"] + 3 * ["7"]), (1, ["4", "7"]), (2, ["4,7"])]
)
def test_nodes_share_the_gpus_out(gpus, seen, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.setenv(VISIBLE, "4,7")
    assert [place[VISIBLE] for place in places(1, gpus)] == seen
    assert len(places(4, gpus)) == min(4, len(seen))
    with pytest.raises(BouquetError, match=r"--gpus\): expected at most 2, got 3"):
        places(1, 3)
