"""``bouquet watch``: every frame is made from the run directory alone."""

import fcntl
import io
import json
import re
import shutil
import time
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console

from common.record.run import Run
from deploy import watch
from deploy.command import main
from tests.support import recorded


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return recorded.plain(tmp_path_factory.mktemp("watched"))


class Coordinator:
    """Writes a recorded run again, line by line, holding the lock of a run that is under way."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder, self.source = folder, source
        self.lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        self.open()

    def open(self) -> None:
        self.record = (self.folder / "metrics.jsonl").open("a")
        fcntl.flock(self.record, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write_until(self, phase: str, round: int) -> None:
        while self.lines:
            line = self.lines.pop(0)
            self.record.write(line)
            self.record.flush()
            event = json.loads(line)
            if (event["phase"], event["round"]) == (phase, round):
                return

    def die(self) -> None:
        self.record.close()

    def finish(self) -> None:
        self.write_until("none", 0)
        shutil.copy(self.source / "summary.json", self.folder)
        self.die()


@pytest.fixture
def coordinator(plain, tmp_path):
    started = Coordinator(plain, tmp_path / "run")
    yield started
    started.die()


def seen(folder: Path, now: float | None = None) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(watch.frame(Run.read(folder), time.time() if now is None else now))
    return console.file.getvalue()


@pytest.mark.slow
def test_a_frame_says_how_far_the_run_is(coordinator):
    assert "waiting for nodes" in seen(coordinator.folder)
    coordinator.write_until("train", 1)
    shown = seen(coordinator.folder)
    assert "round 0/3" in shown
    assert "the time left is known after the first round" in shown
    assert [re.search(rf"{node} │ (\w+) ", shown)[1] for node in recorded.NODES] == ["sent", "training", "training"]
    coordinator.write_until("failure", 2)
    shown = seen(coordinator.folder)
    assert "round 1/3" in shown
    assert [re.search(rf"{node} │ (\w+) ", shown)[1] for node in recorded.NODES] == ["sent", "failed", "training"]
    assert "failed: ward-2, train 2: </table><script>document.title = 'taken'</script> CUDA out of memory" in shown
    assert "\x1b" not in shown


def test_of_a_node_on_this_machine_a_frame_says_how_far_its_round_is(coordinator, tmp_path):
    coordinator.write_until("train", 1)
    name = Run.read(coordinator.folder).settings.run
    facts = {"run": name, "node": "ward-2", "round": 1, "done": 2, "total": 8, "seconds": 10.0, "speed": 99.7}
    for run in (name, "another"):
        (tmp_path / "state/steps" / run).mkdir(parents=True)
        (tmp_path / "state/steps" / run / "ward-2.json").write_text(json.dumps(facts | {"run": run}))
    told = "step 2/8, 100 tokens/s, 30 s left"
    assert re.search(rf"ward-2 │ {told} ", seen(coordinator.folder))
    facts["run"] = "another"
    (tmp_path / "state/steps" / name / "ward-2.json").write_text(json.dumps(facts))
    assert re.search(r"ward-2 │ training ", seen(coordinator.folder))


def test_the_time_left_is_that_of_the_rounds_so_far(coordinator):
    coordinator.write_until("merge", 2)
    run = Run.read(coordinator.folder)
    start, first, second = run.marks
    assert first - start != pytest.approx((second - start) / 2)
    written = (coordinator.folder / "metrics.jsonl").stat().st_mtime
    assert run.pace == pytest.approx((second - start) / 2)
    for waited in (0.0, run.pace / 2, 100 * run.pace):
        left = max(0.0, run.pace - waited)
        assert f"{run.pace:.1f} s per round, about {left:.1f} s left" in seen(coordinator.folder, written + waited)


def test_it_lives_through_a_kill_and_ends_with_the_run(coordinator, monkeypatch):
    """Between two looks the run is killed, gone on with, and finished."""
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    coordinator.write_until("merge", 1)
    steps = iter([coordinator.die, coordinator.open, lambda: coordinator.write_until("merge", 2), coordinator.finish])
    monkeypatch.setattr("deploy.watch.time.sleep", lambda _: next(steps)())
    watch.follow(coordinator.folder, console)
    states = re.findall(r"run  (running|broken off|finished)", console.file.getvalue())
    assert [state for state, _ in groupby(states)] == ["running", "broken off", "running", "finished"]
    assert "resume=true with the same run-name resumes" in console.file.getvalue()
    assert next(steps, None) is None


def test_ctrl_c_leaves_it_cleanly_and_the_run_alone(coordinator, monkeypatch, capsys):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.watch.time.sleep", interrupt)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["watch", str(coordinator.folder)]) == 0
    assert "the run is not affected" in capsys.readouterr().out
    assert Run.read(coordinator.folder).state == "running"


def test_the_newest_run_is_watched_where_none_is_named(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert main(["watch"]) == 2
    assert "there is no run to watch (runs). Start one with bouquet run" in capsys.readouterr().err
    for name in ("old", "new"):
        shutil.copytree(plain, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "metrics.jsonl").touch()
        time.sleep(0.02)
    assert main(["watch"]) == 0
    assert capsys.readouterr().out.startswith("new  finished")


def test_many_nodes_do_not_push_the_rest_away(coordinator):
    coordinator.record.write(
        json.dumps({"phase": "asked", "round": 1, "nodes": [f"n{n:03d}" for n in range(200)]}) + "\n"
    )
    coordinator.record.flush()
    shown = seen(coordinator.folder)
    assert "and 176 more" in shown
    assert len(shown.splitlines()) < 40
