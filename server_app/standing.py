"""Which of a run's states are the best by their scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from common.adapter.values import State
from common.record import checkpoint, events
from common.record.run import Run, figures
from server_app.scoring import Evaluation


@dataclass
class Standing:
    """What the scores of a run say so far.

    ``best`` is the best state of this session, the first one included, and ``stale`` how many scorings have passed
    since it; ``chosen`` is the best of all rounds, those of earlier sessions included.
    """

    best: tuple[State, Evaluation | None]
    chosen: tuple[int, Evaluation] | None = None
    stale: int = 0

    @classmethod
    def at_start(cls, state: State, folder: Path, checkpoints: Path) -> Self:
        """That of a session that begins with ``state``, in the run directory ``folder``."""
        return cls((state, None), _remembered(state.round, folder, checkpoints))

    def judge(self, state: State, evaluation: Evaluation | None) -> None:
        """Take in the score of one more state; None where no node has scored it."""
        before = self.best[1]
        if before is None or (evaluation is not None and evaluation.above(before) < 0):
            self.best, self.stale = (state, evaluation), 0
        else:
            self.stale += 1
        if evaluation is None or not state.round:
            return
        if self.chosen is None or evaluation.above(self.chosen[1]) <= 0:
            self.chosen = state.round, evaluation

    def next_may_end(self, patience: int) -> bool:
        """Whether a score that is no better would be the last that ``patience`` waits for."""
        return 0 < patience <= self.stale + 1 and self.best[1] is not None

    @property
    def rounds(self) -> set[int]:
        """The rounds whose states may still be asked for."""
        return {self.best[0].round, self.chosen[0] if self.chosen else 0}


def _remembered(done: int, folder: Path, checkpoints: Path) -> tuple[int, Evaluation] | None:
    """Of the rounds of earlier sessions, the best one by its scores whose state is still there."""
    if not done:
        return None
    run, there = Run.read(folder), checkpoint.rounds(checkpoints)
    scores = {
        node: figures(own, lambda event: event.score) for node, own in sorted(run.by_node(events.Evaluate).items())
    }
    best: tuple[int, Evaluation] | None = None
    for turn, judged in sorted(run.by_round(events.Judged).items()):
        if turn not in there or turn > done or judged.by is None:
            continue
        told = {node: own[turn] for node, own in scores.items() if turn in own}
        evaluation = Evaluation(run.held_out[turn], judged.by, told, "", judged.losses or {})
        if best is None or evaluation.above(best[1]) <= 0:
            best = turn, evaluation
    return best
