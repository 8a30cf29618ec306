"""The runs of a comparison: those that are finished are kept, broken ones resumed, the others started."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.readable import duration
from common.record.directory import CHECKPOINTS, Settings, Summary
from deploy.compare.cells import TRANSIENT, Cell
from deploy.compare.results import Result, read
from deploy.simulation.attempt import FLOWERS_LOG
from deploy.simulation.one_program import simulate
from deploy.simulation.workers import Workers


class Runs:
    """The folder that holds one run directory a cell, as ``bouquet run`` leaves it."""

    def __init__(self, folder: Path, nodes: int, cpus: int, gpus: float) -> None:
        self._folder = folder
        self._nodes = nodes
        self._machine = (cpus, gpus)

    def results(self, cells: Sequence[Cell]) -> list[Result]:
        """What the finished cells came to."""
        return [read(cell, self._folder / cell.name) for cell in cells if self.is_finished(cell)]

    def is_finished(self, cell: Cell) -> bool:
        """Whether a cell need not be run again: it has a summary, and the config that is asked for."""
        run = self._folder / cell.name
        return Summary.read(run) is not None and _config(run) == cell.config

    def run(self, cells: Sequence[Cell]) -> list[Cell]:
        """Run what is not finished, one after another, a line a cell; returns the cells that failed."""
        runs = {cell.name: cell for cell in cells}
        due = [cell for cell in runs.values() if not self.is_finished(cell)]
        if len(due) < len(runs):
            print(f"{len(runs) - len(due)} of {len(runs)} runs are finished already", flush=True)
        failed: list[Cell] = []
        started = time.monotonic()
        with Workers(self._nodes, *self._machine) as workers:
            for number, cell in enumerate(due, start=1):
                before = time.monotonic()
                done = self._run(cell, workers)
                now = time.monotonic()
                outcome = self._outcome(cell) if done else f"failed, see {self._folder / cell.name / FLOWERS_LOG}"
                left = (now - started) / number * (len(due) - number)
                timing = f"{now - before:.0f} s, {duration(left)} left"
                print(f"[{number}/{len(due)}] {cell.label}: {outcome}  {timing}", flush=True)
                failed += [] if done else [cell]
        return failed

    def _run(self, cell: Cell, workers: Workers) -> bool:
        run = self._folder / cell.name
        resume = (run / CHECKPOINTS).is_dir() and _config(run) == cell.config
        if run.exists() and not resume:
            shutil.rmtree(run)
        config = dict(cell.config) | {"run-name": cell.name, "resume": resume}
        code = simulate(workers, self._nodes, self._folder, config, follow=False)
        return code == 0 and self.is_finished(cell)

    def _outcome(self, cell: Cell) -> str:
        result = read(cell, self._folder / cell.name)
        return f"{result.metric} {result.heldout:.4g}" if result.heldout is not None else "done"


def _config(run: Path) -> Mapping[str, Any]:
    """The config that a run was started with; empty where it cannot be read."""
    return {key: value for key, value in Settings.read(run).config.items() if key not in TRANSIENT}
