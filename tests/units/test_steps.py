"""How far a node of this machine is within a round: what is written down of it, and what a terminal shows."""

import io
import json
import re
import stat
import time

import pytest
from rich.console import Console

from common.config.node import NodeConfig
from common.record import steps as module
from common.record.steps import StepsFile, under_way
from deploy import watch
from deploy.command import main
from deploy.simulation import steps as shown_steps
from tests.support.grid import run_in_process
from tests.support.private_runs import PRIVATE


@pytest.fixture
def clock(monkeypatch):
    """Time as the test says."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_step_is_written_down_once_a_second_at_most_for_this_user_alone(tmp_path, clock):
    with StepsFile(tmp_path, "flu", "ward-1", 3, counted=True) as file:
        clock[0] += 0.5
        file.tell(1, 40, 100)
        assert under_way(tmp_path) == []
        clock[0] += 1.5
        file.tell(4, 40, 400)
        clock[0] += 0.5
        file.tell(5, 40, 500)
        (written,) = under_way(tmp_path, "flu")
        assert (written.run, written.node, written.round, written.done) == ("flu", "ward-1", 3, 4)
        assert str(written) == "step 4/40, 200 tokens/s, 18 s left"
        assert under_way(tmp_path, "colds") == []
        (path,) = tmp_path.rglob("*.json")
        assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o600, 0o700]
    assert not list(tmp_path.rglob("*.json*"))
    assert not (tmp_path / "steps/flu").exists()


def test_what_is_left_of_a_round_that_fails_is_nothing_either(tmp_path, clock):
    def fail() -> None:
        with StepsFile(tmp_path, "flu", "ward-1", 1, counted=True) as file:
            clock[0] += 2
            file.tell(1, 2, 10)
            assert under_way(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert under_way(tmp_path) == []


def test_a_disk_that_does_not_take_it_costs_nobody_a_round(tmp_path, clock):
    (tmp_path / "steps").write_text("in the way")
    with StepsFile(tmp_path, "flu", "ward-1", 1, counted=True) as file:
        clock[0] += 2
        file.tell(1, 2, 10)
    assert (tmp_path / "steps").read_text() == "in the way"


def test_a_torn_file_is_passed_over(tmp_path):
    (tmp_path / "steps/flu").mkdir(parents=True)
    (tmp_path / "steps/flu/ward-1.json").write_text('{"node": "ward-1", "to')
    assert under_way(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param({}, id="plain"), pytest.param(PRIVATE, id="private")])
def test_a_node_writes_its_steps_down_and_of_a_private_round_no_tokens(mode, settings, tmp_path, monkeypatch):
    seen, tell = [], StepsFile.tell

    def look(file, *told):
        tell(file, *told)
        seen.extend(json.loads(each.read_text()) for each in (tmp_path / "state").rglob("steps/*/*.json"))

    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(StepsFile, "tell", look)
    config = settings(**mode, **{"train.steps": 3, "min-nodes": 1}) | {"num-server-rounds": 1}
    run_in_process(config, nodes=1)
    assert [(each["done"], each["total"], each["round"]) for each in seen] == [(1, 3, 1), (2, 3, 1), (3, 3, 1)]
    facts = {"run", "node", "round", "done", "total", "seconds", "at"}
    assert {*seen[0]} == (facts if mode else facts | {"speed"})
    assert not list((tmp_path / "state").rglob("steps/*"))


class Screen:
    """What a terminal of 100 columns shows of what is written to it, by the few sequences that are needed."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def show(self, written: str) -> list[str]:
        for control, count, kind, text in re.findall(r"(\x1b\[\??([\d;]*)([A-Za-z]))|([^\x1b])", written):
            if not control:
                self._put(text)
            elif kind == "A":
                self.row -= int(count or 1)
            elif kind == "K":
                assert count == "2"
                self.lines[self.row] = ""
            else:
                assert kind in "hlm"
        return [line.rstrip() for line in self.lines]

    def _put(self, sign: str) -> None:
        if sign == "\r":
            self.column = 0
        elif sign == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + sign + line[self.column + 1 :]
            self.column += 1


def written(folder, node: str, round: int = 1, **figures) -> None:
    """A node's file, as it was left at this moment."""
    facts = {"run": "flu", "node": node, "round": round, "done": 2, "total": 8, "seconds": 10.0, "at": time.time() + 60}
    file = folder / "steps/flu" / f"{node}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts | figures))


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The state directory of a simulation."""
    monkeypatch.setattr("common.config.node.STATE_DIRECTORY", tmp_path / "state")
    return tmp_path / "state"


def test_what_is_printed_stays_whole_above_the_steps_and_nothing_of_them_is_left(state, monkeypatch):
    monkeypatch.setattr(shown_steps, "REFRESHED", 1000)
    terminal, said = io.StringIO(), [f"round {number}/4  " + "told " * number for number in range(1, 5)]
    monkeypatch.setattr("sys.stdout", terminal)
    console = Console(file=terminal, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    with shown_steps.shown("flu", console):
        for number, line in enumerate(said):
            written(state, f"node-{number:03d}", speed=1234.5)
            time.sleep(0.02)
            print(line, "and its second line", sep="\n")
        time.sleep(0.02)
        during = Screen().show(terminal.getvalue())
    told = [line for each in said for line in (each.rstrip(), "and its second line")]
    assert during[:8] == told
    assert during[8:12] == [f"  node-{n:03d}, round 1: step 2/8, 1,234 tokens/s, 30 s left" for n in range(4)]
    after = Screen().show(terminal.getvalue())
    assert [line for line in after if line] == told


def test_a_log_has_nothing_of_the_steps(state, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stdout", log)
    written(state, "node-000")
    with shown_steps.shown("flu", Console(file=log)):
        print("round 1/1")
    assert log.getvalue() == "round 1/1\n"


def test_of_many_nodes_some_are_shown_and_of_earlier_rounds_none(state):
    for number in range(30):
        written(state, f"node-{number:03d}", round=2)
    written(state, "node-030", round=1)
    written(state, "node-031", round=2, at=5.0)
    lines = shown_steps.lines("flu", time.time()).plain.splitlines()
    assert len(lines) == shown_steps.MOST_NODES + 1
    assert lines[-1] == "  and 22 more"


def test_the_operator_of_a_node_watches_it_without_a_run_directory(tmp_path, capsys):
    config = tmp_path / "node.toml"
    config.write_text(f'name = "ward-1"\nstate-directory = "{tmp_path}/state"\n')
    assert main(["watch", "--node", str(config)]) == 0
    assert capsys.readouterr().out == "ward-1\nnot training\n"
    written(tmp_path / "state", "ward-1", round=7)
    written(tmp_path / "state", "ward-2")
    console = Console(file=io.StringIO(), width=120)
    (steps,) = under_way(tmp_path / "state")[:1]
    console.print(watch.node_frame(NodeConfig.read(config), steps.at + 3))
    assert console.file.getvalue() == "ward-1\nflu, round 7: step 2/8, 30 s left, 3.0 s ago\n"
