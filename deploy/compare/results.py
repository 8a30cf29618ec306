"""The results of a comparison's runs: one cell's figures, and those of one row over its seeds."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.record.event import Scored
from common.record.events import Central, Evaluate, HeldOut, Merge
from common.record.run import Run, figures
from common.tasks import TASKS
from deploy.compare.cells import Cell
from deploy.compare.profile import BASELINES

BASE = "base"


@dataclass
class Result:
    """One run's figures. Histories are the task's metric by round, 0 for the base model; ``nodes`` likewise by node.

    Bytes are those of training, over all nodes and rounds; how long the rounds took is in seconds.
    """

    cell: Cell
    metric: str
    on_nodes: dict[int, float] = field(default_factory=dict)
    central: dict[int, float] = field(default_factory=dict)
    nodes: dict[int, dict[str, float]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    further: dict[int, float] = field(default_factory=dict)
    """Macro-F1 or exact match by round, where the task has it."""

    @property
    def heldout(self) -> float | None:
        """The last figure: on the nodes, or centrally where they do not score."""
        history = self.on_nodes or self.central
        return history[max(history)] if history else None


class Spread(NamedTuple):
    """A mean over the seeds, and its sample standard deviation: 0 for one seed."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Row:
    """One line of the table: a method in one setting, over its seeds. None is what was not measured.

    ``setting`` is what it may be compared within. ``fairness`` is the standard deviation over the nodes of one run,
    ``worst`` its worst node; both averaged over the seeds. ``points`` are the figures of every node of every run,
    ``history`` the mean over the seeds by round. Nothing has to cross for the baselines, so their bytes are 0, whatever
    their simulation sent.
    """

    method: str
    setting: str
    partition: str
    rank: int
    privacy: str
    epsilon: float | None
    seeds: int
    on_nodes: Spread | None
    central: Spread | None
    further: Spread | None
    fairness: float | None
    worst: float | None
    bytes_up: float
    bytes_down: float
    seconds: float
    points: tuple[float, ...]
    history: dict[int, float]

    @property
    def megabytes(self) -> float:
        """MB (10^6 bytes) that crossed in training, both ways, over all nodes and rounds."""
        return (self.bytes_up + self.bytes_down) / 1e6


def read(cell: Cell, folder: Path) -> Result:
    """The figures of one run directory. A resumed run has written some rounds twice: the last counts."""
    run, further = Run.read(folder), TASKS[cell.config["task.name"]].further
    merges = run.by_round(Merge).values()
    scored: dict[int, Scored] = {**run.by_round(Central), **run.by_round(HeldOut)}
    result = Result(cell, TASKS[cell.config["task.name"]].metric, on_nodes=run.held_out, central=run.central)
    for node, events in run.by_node(Evaluate).items():
        for number, score in figures(events, lambda event: event.score).items():
            result.nodes.setdefault(number, {})[node] = score
    result.further = {
        number: event.further[further] for number, event in scored.items() if event.further and further in event.further
    }
    result.bytes_up, result.bytes_down = (sum(merge.crossed[way] for merge in merges) for way in ("up", "down"))
    result.seconds = sum(merge.seconds for merge in merges)
    return result


def rows(results: Sequence[Result], quality: str) -> list[Row]:
    """The table: for every setting the base model, the baselines, and the rules, in the order of the profile."""
    several = len({result.cell.rank for result in results}) > 1
    settings: dict[str, list[Result]] = {}
    for result in results:
        cell = result.cell
        settings.setdefault(f"{cell.partition}, rank {cell.rank}" if several else cell.partition, []).append(result)
    table: list[Row] = []
    for setting, together in settings.items():
        # Before the first round a run has the base model, whatever the rule: one run a seed is enough.
        plain: dict[int, Result] = {}
        for result in sorted(together, key=lambda result: not result.central):
            if result.cell.epsilon is None:
                plain.setdefault(result.cell.seed, result)
        table += [_row(BASE, setting, list(plain.values()), quality, min)] if plain else []
        lines: dict[tuple[str, str], list[Result]] = {}
        for result in together:
            lines.setdefault((result.cell.method, result.cell.privacy), []).append(result)
        table += [_row(method, setting, line, quality, max) for (method, _), line in lines.items()]
    return table


def _row(method: str, setting: str, results: list[Result], quality: str, choose: Callable[[Iterable[int]], int]) -> Row:
    """A line over its seeds, of the first round or of the last."""
    cell = results[0].cell
    at = [result.nodes[choose(result.nodes)] for result in results if result.nodes]
    better = max if TASKS[cell.config["task.name"]].rises else min
    worst = max if better is min else min
    untrained, alone = method == BASE, method in (BASE, *BASELINES)
    histories = [result.central if quality == "central" else result.on_nodes for result in results]
    shared = sorted(set(histories[0]).intersection(*histories[1:]))
    return Row(
        method=method,
        setting=setting,
        partition=cell.partition,
        rank=cell.config["lora.rank"],
        privacy=cell.privacy,
        epsilon=cell.epsilon,
        seeds=len(results),
        on_nodes=_spread([result.on_nodes[choose(result.on_nodes)] for result in results if result.on_nodes]),
        central=_spread([result.central[choose(result.central)] for result in results if result.central]),
        further=_spread([result.further[choose(result.further)] for result in results if result.further]),
        fairness=_mean([statistics.pstdev(nodes.values()) for nodes in at]),
        worst=_mean([worst(nodes.values()) for nodes in at]),
        bytes_up=0.0 if alone else statistics.fmean(result.bytes_up for result in results),
        bytes_down=0.0 if alone else statistics.fmean(result.bytes_down for result in results),
        seconds=0.0 if untrained else statistics.fmean(result.seconds for result in results),
        points=tuple(figure for nodes in at for figure in nodes.values()),
        history={} if untrained else {number: statistics.fmean(h[number] for h in histories) for number in shared},
    )


def _spread(figures: list[float]) -> Spread | None:
    if not figures:
        return None
    return Spread(statistics.fmean(figures), statistics.stdev(figures) if len(figures) > 1 else 0.0)


def _mean(figures: list[float]) -> float | None:
    return statistics.fmean(figures) if figures else None
