"""How long a simulated run takes before its first step: by Flower's simulation, and in one program.

    python -m benchmarks.start --runs 3

The runs are of different rules and seeds, as a comparison's are. Those of Flower's simulation share its SuperLink and
start Ray each; those in one program share their worker processes. The first run's adapter is the same, bit for bit.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from os import devnull
from pathlib import Path
from typing import Any

from common.record.directory import CONFIG, Summary
from common.record.events import Train
from common.record.run import Run
from deploy.simulation import flower_run, one_program
from deploy.simulation.workers import Workers

NODES = 4
SETTINGS = {
    "num-server-rounds": 1,
    "data.limit": 40,
    "train.steps": 2,
    "train.batch-size": 4,
    "evaluation.limit": 4,
    "evaluation.prompt": "",
}
RULES = ("fedit", "ffa-lora", "fedsvd", "flora")
Simulate = Callable[[Path, Mapping[str, Any]], int]


def before_first_step(simulate: Simulate, directory: Path, number: int) -> tuple[float, float, str]:
    """Seconds to the first step and of the whole of the run of this number from 0, and the digest of its adapter."""
    name, started = f"run-{number}", time.time()
    config = SETTINGS | {"rule.name": RULES[number % len(RULES)], "seed": number, "run-name": name}
    with open(devnull, "w") as nowhere, redirect_stdout(nowhere):
        if simulate(directory, config):
            raise SystemExit("a run failed; why is above")
    whole, folder = time.time() - started, directory / name
    # Events count from the moment at which a run writes its config; a node counts its steps alone.
    opened = (folder / CONFIG).stat().st_mtime - started
    first = min(event.elapsed - (event.seconds or 0.0) for event in Run.read(folder).all(Train))
    summary = Summary.read(folder)
    return opened + first, whole, summary.adapter_digest if summary else ""


def measure(name: str, simulate: Simulate, runs: int) -> str:
    """Print a line a run; the digest of the first one's adapter."""
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs):
            first, whole, digest = before_first_step(simulate, Path(folder), number)
            print(f"{name}, run {number + 1}: {first:.1f} s to the first step, {whole:.1f} s in all", flush=True)
            digests.append(digest)
    return digests[0]


def main() -> None:
    """Print the runs of Flower's simulation and those in one program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    flowers = measure("Flower's simulation", lambda *run: flower_run.simulate(NODES, 1, 0.0, *run), runs)
    with Workers(NODES, 1, 0.0) as workers:
        own = measure("in one program", lambda *run: one_program.simulate(workers, NODES, *run), runs)
    print(f"the first run's adapter is {'the same, bit for bit' if flowers == own else 'ANOTHER ONE'}")


if __name__ == "__main__":
    main()
