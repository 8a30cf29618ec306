"""A run directory, read: the one reader of what ``server_app/record.py`` writes.

A run may be under way, broken off, resumed, or older than this code, so anything may be missing: what is not there is
empty or None, and a line that cannot be read is counted and passed over.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from common.error import BouquetError
from common.json_files import filled, number, read_lines
from common.record.directory import CONFIG, METRICS, Settings, Summary, find, is_run, is_running
from common.record.event import Event, OfNode
from common.record.events import (
    Against,
    AggregationError,
    Asked,
    Camps,
    Central,
    Dropped,
    Evaluate,
    Failure,
    HeldOut,
    Late,
    Merge,
    Opened,
    RuleFacts,
    Start,
    Stopped,
    Train,
    from_line,
)

E = TypeVar("E", bound=Event)
N = TypeVar("N", bound=OfNode)
RunState = Literal["running", "finished", "broken off"]

# What an attempt at a round leaves that is void where the round is tried again, or dropped.
OF_AN_ATTEMPT = (Train, Merge, AggregationError, Against, Camps)


class Tally:
    """What the events of a run add up to, whichever session wrote them; terminal, summary and report say it.

    ``crossed`` are the bytes of adapters ``up`` and ``down``: of training, of rounds that did not count, of scoring.
    ``failures`` and ``late`` replies are by node.
    """

    def __init__(self) -> None:
        self.crossed = {"up": 0, "down": 0}
        self.failures: Counter[str] = Counter()
        self.late: Counter[str] = Counter()

    def hear(self, event: Event) -> None:
        """Add one event."""
        for way, size in event.crossed.items():
            self.crossed[way] += size
        if isinstance(event, Failure):
            self.failures[event.node] += 1
        elif isinstance(event, Late):
            self.late[event.node] += 1


def read_events(folder: Path) -> tuple[tuple[Event, ...], int]:
    """The events of the run directory ``folder``, in order, and how many lines cannot be read."""
    found = [None if line is None else from_line(line) for line in read_lines(folder / METRICS)]
    events = tuple(event for event in found if event is not None)
    return events, len(found) - len(events)


@dataclass(frozen=True)
class Run:
    """One run as its directory has it. ``summary`` is None until it is finished; ``torn`` counts unreadable lines."""

    folder: Path
    settings: Settings
    summary: Summary | None
    events: tuple[Event, ...]
    torn: int
    running: bool

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run directory. Raises :class:`BouquetError` where there is none."""
        if not is_run(folder):
            inside = [run.name for run in find(folder)] if folder.is_dir() else []
            raise BouquetError(
                "there is no run here",
                where=str(folder),
                expected=f"a run directory, which has {CONFIG} and {METRICS}",
                got=f"a folder of {len(inside)} runs" if inside else "another folder" if folder.is_dir() else "nothing",
                cure=f"Name one of them, such as {folder / inside[-1]}." if inside else "bouquet runs lists the runs.",
            )
        # A run that ends meanwhile has its summary before it is no longer under way.
        running = is_running(folder)
        return cls(folder, Settings.read(folder), Summary.read(folder), *read_events(folder), running)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.resolve().name

    @property
    def config(self) -> Mapping[str, Any]:
        """The whole config of the run, by key."""
        return self.settings.config

    @property
    def state(self) -> RunState:
        """Whether it is under way, by the lock of the process that writes it, or has its closing figures."""
        return "running" if self.running else "finished" if self.summary else "broken off"

    @property
    def stopped(self) -> Stopped | None:
        """How and why it was broken off, where that could still be written down."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Stopped) else None

    @property
    def private(self) -> bool:
        """Whether no figure leaves a node."""
        return str(self.config.get("privacy.mode", "none")) != "none"

    @property
    def rounds(self) -> int:
        """Rounds that were asked for."""
        return int(number(self.config, "num-server-rounds") or 0)

    @property
    def done(self) -> int:
        """The last round that is finished."""
        return max(self.by_round(Merge), default=0)

    @property
    def exported(self) -> int:
        """The round whose model it has left; the last one that is finished where that is not known."""
        return (self.summary and self.summary.rounds) or self.done

    @cached_property
    def counted(self) -> tuple[Event, ...]:
        """The events that count: of a round that was tried or run again, those of the last time."""
        kept: list[Event | None] = []
        # Where the events of the last attempt at each round are.
        attempts: dict[int, list[int]] = {}
        for event in self.events:
            turn = event.round
            if isinstance(event, Asked | Dropped):
                for place in attempts.pop(turn, []):
                    kept[place] = None
            elif isinstance(event, Start):
                kept = [old if old and (old.round <= turn or isinstance(old, Failure)) else None for old in kept]
            elif isinstance(event, OF_AN_ATTEMPT):
                attempts.setdefault(turn, []).append(len(kept))
            kept.append(event)
        return tuple(event for event in kept if event is not None)

    @cached_property
    def nodes(self) -> list[str]:
        """Every node that has taken part, by name."""
        asked = {name for event in self.all(Asked) for name in event.nodes}
        return sorted(asked | {event.node for event in self.events if isinstance(event, Train | Evaluate)} - {""})

    def by_round(self, kind: type[E]) -> dict[int, E]:
        """The events of a kind that has one a round; the last counts."""
        return {event.round: event for event in self.counted if isinstance(event, kind)}

    def by_node(self, kind: type[N]) -> dict[str, dict[int, N]]:
        """The events of a kind that has one a node and round; the last counts."""
        found: dict[str, dict[int, N]] = {}
        for event in self.counted:
            if isinstance(event, kind) and event.node:
                found.setdefault(event.node, {})[event.round] = event
        return found

    def all(self, kind: type[E]) -> list[E]:
        """Every event of a kind, whether its round counted or not."""
        return [event for event in self.events if isinstance(event, kind)]

    def history(self, kind: type[E], figure: Callable[[E], float | None]) -> dict[int, float]:
        """A figure by round, where it is known."""
        return figures(self.by_round(kind), figure)

    @cached_property
    def rule(self) -> RuleFacts:
        """What the rule says of itself; nothing before the run has started."""
        return next((event.rule for event in self.all(Start)), filled(RuleFacts, {}))

    @cached_property
    def metric(self) -> str:
        """What held-out examples are scored by; empty where none was."""
        scored = [*self.all(HeldOut), *self.all(Central)]
        return next((event.metric for event in scored if event.metric), "")

    @cached_property
    def held_out(self) -> dict[int, float]:
        """The score over the nodes by round, 0 before training."""
        return self.history(HeldOut, lambda event: event.score)

    @cached_property
    def central(self) -> dict[int, float]:
        """The score on the coordinator's own examples by round, 0 before training."""
        return self.history(Central, lambda event: event.score)

    @property
    def scores(self) -> dict[int, float]:
        """The overall score by round: over the nodes, or centrally where they do not score."""
        return self.held_out or self.central

    @cached_property
    def losses(self) -> dict[int, float]:
        """The mean loss of training by round."""
        return self.history(Merge, lambda event: event.loss)

    @cached_property
    def lost(self) -> dict[int, float]:
        """The share of the nodes' mean update that merging has lost, by round."""
        return self.history(AggregationError, lambda event: event.overall)

    @cached_property
    def tally(self) -> Tally:
        """Bytes, failures and late replies of the whole run."""
        tally = Tally()
        for event in self.events:
            tally.hear(event)
        return tally

    def trained(self, way: str, *, by_formula: bool = False) -> float:
        """Bytes of training in the rounds that count, as measured or of the values that the rule sends."""
        merges = self.by_round(Merge).values()
        return sum((merge.formula if by_formula else merge.crossed)[way] for merge in merges)

    @property
    def seconds(self) -> float:
        """How long it ran: from the start of each of its sessions to the session's last line."""
        total = before = 0.0
        for event in self.events:
            now = event.elapsed
            if isinstance(event, Opened):
                before = 0.0
            total, before = total + (now - before if now >= before else now), now
        return total

    @property
    def session(self) -> tuple[Event, ...]:
        """The events since the run was last started or resumed."""
        first = max((index for index, event in enumerate(self.events) if isinstance(event, Opened)), default=0)
        return self.events[first:]

    @property
    def marks(self) -> list[float]:
        """Seconds into this session at which it began its rounds, and at which each was finished."""
        return [event.elapsed for event in self.session if isinstance(event, Start | Merge)]

    @property
    def pace(self) -> float | None:
        """Seconds from one finished round to the next, a mean of this session's; None before there is one."""
        marks = self.marks
        return (marks[-1] - marks[0]) / (len(marks) - 1) if len(marks) > 1 else None


def figures(events: Mapping[int, E], figure: Callable[[E], float | None]) -> dict[int, float]:
    """A figure of events by round, in the order of rounds, where it is known."""
    found = {turn: figure(event) for turn, event in sorted(events.items())}
    return {turn: value for turn, value in found.items() if value is not None}
