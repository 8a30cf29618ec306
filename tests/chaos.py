"""Faults at random moments in one run of a real federation: `make chaos`, or

    python -m tests.chaos --faults 30 --seed 0

Every process is killed with -9, warm workers too, clients hang, the link is cut and slowed down, the disk is full. Each
fault is mended after a while, as a supervisor or an operator would; a run that has failed is started again with
resume=true. At the end every round has been merged exactly once, no checkpoint is lost, and the run is complete.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.error import BouquetError
from common.record import checkpoint
from deploy.bundles import forks
from deploy.site.folder import Site
from deploy.site.superlink import statuses
from tests.support.ports import listens
from tests.support.processes import Federation, federation, wait_for

NODES = 3
SETTINGS = (
    "data.limit=40 train.steps=2 train.batch-size=4 evaluation.limit=4 evaluation.every=0 resume=true "
    'evaluation.prompt="" min-nodes=2 round.deadline=120.0 round.wait=300.0 round.retries=9 round.sit-out=1'
)


class Chaos:
    """One run under faults."""

    def __init__(self, wards: Federation, runs: Path, rounds: int, seed: int, say: Callable[[str], None]) -> None:
        self.wards, self.runs, self.rounds, self.say = wards, runs, rounds, say
        self.dice = random.Random(seed)
        self.starts = 0
        self.seen: dict[int, bytes] = {}
        self.submit()

    @property
    def folder(self) -> Path:
        return self.runs / "chaos"

    def submit(self) -> None:
        wait_for(lambda: listens(self.wards.control), "the SuperLink")
        self.run = self.wards.submit("chaos", f"{SETTINGS} num-server-rounds={self.rounds}", self.runs)
        self.starts += 1

    def supervise(self) -> None:
        """Start again what has ended, as systemd would: the key of a node that was killed is refused for a minute."""
        for process in (self.wards.superlink, self.wards.superexec, *self.wards.nodes.values()):
            if process.popen.poll() is not None:
                process.kill()
                process.start()

    def everyone(self) -> bool:
        """Whether every node is online."""
        self.supervise()
        known = statuses(site := Site.open(self.wards.site))
        return all(known.get(node.id) == "online" for node in site.facts.nodes.values())

    def finished(self) -> bool:
        """Whether the run is complete; one that failed is started again."""
        self.supervise()
        self.check()
        status = self.wards.status(self.run)
        if status.startswith("finished") and status != "finished:completed":
            self.say(f"    the run ended as {status}: started again with resume=true")
            self.submit()
        return status == "finished:completed"

    def check(self) -> None:
        """No finished round is lost, or made again."""
        files = sorted((self.folder / "checkpoints").glob("round-*.safetensors"))
        for number, file in enumerate(files, start=1):
            assert file.stem == f"round-{number:04d}", f"a checkpoint is missing before {file}"
            content = file.read_bytes()
            assert self.seen.setdefault(number, content) == content, f"{file} was made again"
        assert len(files) >= len(self.seen), "a checkpoint is lost"

    def fault(self, name: str) -> None:
        getattr(self, f"_{name}")()

    def _kill_supernode(self) -> None:
        node = self.dice.choice(list(self.wards.nodes.values()))
        node.kill()
        time.sleep(self.dice.uniform(0, 5))
        node.start()

    def _kill_superlink(self) -> None:
        self._again(self.wards.superlink)

    def _kill_superexec(self) -> None:
        self._again(self.wards.superexec)

    def _kill_serverapp(self) -> None:
        self._signal("bouquet-serverapp", signal.SIGKILL)

    def _kill_client(self) -> None:
        self._signal(forks.TASK, signal.SIGKILL)

    def _kill_worker(self) -> None:
        self._signal("client_app.worker", signal.SIGKILL)

    def _hang_client(self) -> None:
        for pid in self._signal(forks.TASK, signal.SIGSTOP):
            time.sleep(30)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _cut_link(self) -> None:
        self.wards.wire.cut()
        time.sleep(self.dice.uniform(1, 15))
        self.wards.wire.mend()

    def _slow_link(self) -> None:
        self.wards.wire.bytes_per_second = 50_000
        time.sleep(20)
        self.wards.wire.bytes_per_second = 0

    def _full_disk(self) -> None:
        filler = self.runs / "filler"
        with suppress(OSError), filler.open("wb") as opened:
            while True:
                opened.write(b"\0" * 65536)
        time.sleep(20)
        filler.unlink()

    def _again(self, process) -> None:
        process.kill()
        time.sleep(self.dice.uniform(0, 5))
        process.start()

    def _signal(self, program: str, number: signal.Signals) -> list[int]:
        """Send a signal to one process of this federation that runs ``program``; its id, if there is one."""
        found = [pid for pid in _processes(program) if str(self.wards.folder) in _environment(pid)]
        for pid in (chosen := self.dice.sample(found, min(1, len(found)))):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return chosen

    def verify(self) -> None:
        """At the end."""
        self.check()
        assert len(self.seen) == self.rounds
        for number in self.seen:
            assert checkpoint.load(self.folder / f"checkpoints/round-{number:04d}.safetensors", "fedit").round == number
        events = []
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            with suppress(json.JSONDecodeError):  # torn by a kill
                events.append(json.loads(line))
        merged = [event["round"] for event in events if event["phase"] == "merge"]
        assert len(merged) == len(set(merged)), "a finished round was run again"
        assert json.loads((self.folder / "summary.json").read_text())["rounds"] == self.rounds


FAULTS = sorted(
    name.removeprefix("_") for name in vars(Chaos) if name.startswith(("_kill", "_hang", "_cut", "_slow", "_full"))
)


def _processes(program: str) -> list[int]:
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if program in _read(process / "cmdline").replace("\0", " ") or program == _read(process / "comm").strip()
    ]


def _environment(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/environ"))


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk that can be filled; where none can be mounted, the folder as it is."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def run(folder: Path, faults: list[str], rounds: int, seed: int, say: Callable[[str], None] = print) -> int:
    """The run under ``faults``, one after the other; how often it had to be started."""
    settings = lambda node: [f"partition-id={node}", f"num-partitions={NODES}", "warm=300.0"]  # noqa: E731
    with small_disk(folder / "runs", f"{8 + rounds}m") as mounted, federation(folder, NODES, settings) as wards:
        chaos = Chaos(wards, folder / "runs", rounds, seed, say)
        for number, name in enumerate(faults, start=1):
            if name == "full_disk" and not mounted:
                say(f"fault {number}: no small disk can be mounted here: left out")
                continue
            before = len(chaos.seen)
            wait_for(lambda: chaos.finished() or len(chaos.seen) > before, "a round between faults", 600, pause=1.0)  # noqa: B023
            time.sleep(chaos.dice.uniform(0, 10))
            clock = time.strftime("%H:%M:%S")
            say(f"{clock} fault {number}/{len(faults)} {name}, after round {len(chaos.seen)}, start {chaos.starts}")
            chaos.fault(name)
        wait_for(chaos.finished, "the end of the run", 1200, pause=1.0)
        chaos.verify()
        wait_for(chaos.everyone, "every node to be back", 180, pause=3.0)
        say(f"complete: {len(faults)} faults, {rounds} rounds, {chaos.starts} starts, nothing lost")
        return chaos.starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=FAULTS, help="which faults (default: all)")
    options = parser.parse_args()
    dice, kinds = random.Random(options.seed), options.kinds
    order = [name for _ in range(-(-options.faults // len(kinds))) for name in dice.sample(kinds, len(kinds))]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        run(folder, order[: options.faults], options.faults + 2, options.seed)
    except (AssertionError, BouquetError) as error:
        print(f"chaos: {error}\nwhat every process said is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
