"""A run directory, read.

``server_app/record.py`` writes it. A run may be under way, broken off, gone on with, or older than this code, so
anything may be missing: what is not there is empty or None, and a line that cannot be read is counted and passed over.
"""

import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from common.error import BouquetError

DEFAULT_DIRECTORY = Path.home() / ".bouquet" / "runs"
CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"

AS_ASKED, TOO_FEW = "as asked", "too few nodes"
"""How the rounds of a run have ended, in its summary."""

Event = dict[str, Any]
RunState = Literal["running", "finished", "broken off"]

# What every line of scores has beside the score itself.
BESIDE_THE_SCORE = {"phase", "round", "elapsed", "loss", "seconds"}
# What an attempt at a round leaves that the next attempt makes void.
OF_AN_ATTEMPT = {"train", "merge", "aggregation-error", "against"}


@dataclass(frozen=True)
class Run:
    """One run as its directory has it. ``summary`` is empty until it is finished; ``torn`` counts unreadable lines."""

    folder: Path
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    code: str
    summary: Mapping[str, Any]
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
        settings, summary = _json(folder / CONFIG), _json(folder / SUMMARY)
        events, torn = read_events(folder / METRICS)
        config, versions = (mapping(settings.get(part)) for part in ("config", "versions"))
        code = str(settings.get("code", ""))
        return cls(folder, config, versions, code, summary, events, torn, is_running(folder))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.resolve().name

    @property
    def state(self) -> RunState:
        """Whether it is under way, by the lock of the process that writes it, or has its closing figures."""
        return "running" if self.running else "finished" if self.summary else "broken off"

    @property
    def reason(self) -> str:
        """Why it was broken off, where that could still be written down."""
        last = self.events[-1] if self.events else {}
        return str(last.get("reason", "")) if last.get("phase") == "stopped" else ""

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
        return max(self.by_round("merge"), default=0)

    @cached_property
    def counted(self) -> tuple[Event, ...]:
        """The events that count: of a round that was tried or run again, those of the last time."""
        kept: list[Event] = []
        for event in self.events:
            if event["phase"] == "asked":
                kept = [old for old in kept if not (old["round"] == event["round"] and old["phase"] in OF_AN_ATTEMPT)]
            elif event["phase"] == "start":
                kept = [old for old in kept if old["round"] <= event["round"] or old["phase"] == "failure"]
            kept.append(event)
        return tuple(kept)

    @cached_property
    def nodes(self) -> list[str]:
        """Every node that has taken part, by name."""
        asked = {name for event in self.all("asked") for name in names(event)}
        told = (event for phase in ("train", "evaluate") for event in self.all(phase))
        return sorted(asked | {str(event["node"]) for event in told if "node" in event})

    def by_round(self, phase: str) -> dict[int, Event]:
        """The events of a phase that has one a round; the last counts."""
        return {event["round"]: event for event in self.counted if event["phase"] == phase}

    def by_node(self, phase: str) -> dict[str, dict[int, Event]]:
        """The events of a phase that has one a node and round; the last counts."""
        found: dict[str, dict[int, Event]] = {}
        for event in self.counted:
            if event["phase"] == phase and "node" in event:
                found.setdefault(str(event["node"]), {})[event["round"]] = event
        return found

    def all(self, phase: str) -> list[Event]:
        """Every event of a phase, whether its round counted or not."""
        return [event for event in self.events if event["phase"] == phase]

    def history(self, phase: str, key: str) -> dict[int, float]:
        """A figure by round."""
        found = {turn: number(event, key) for turn, event in sorted(self.by_round(phase).items())}
        return {turn: value for turn, value in found.items() if value is not None}

    @cached_property
    def rule(self) -> Mapping[str, Any]:
        """What the rule says of itself: ``paper``, ``exact``, ``personal``, ``formulas``, ``learning_rate``."""
        return next((mapping(event.get("rule")) for event in self.all("start")), {})

    @cached_property
    def metric(self) -> str:
        """What held-out examples are scored by; empty where none was."""
        scored = [event for phase in ("heldout", "central") for event in self.all(phase)]
        return next((key for event in scored for key in event if key not in BESIDE_THE_SCORE), "")

    @cached_property
    def scores(self) -> dict[int, float]:
        """The overall score by round, 0 before training: over the nodes, or centrally where they do not score."""
        return self.history("heldout", self.metric) or self.history("central", self.metric)

    def crossed(self, way: str, *, by_formula: bool = False) -> float:
        """Bytes of training in the rounds that count, as measured or by the rule's formula."""
        return sum(self.history("merge", f"formula_{way}" if by_formula else f"bytes_{way}").values())

    @property
    def seconds(self) -> float:
        """How long it ran: from the start of each of its sessions to the session's last line."""
        total = before = 0.0
        for event in self.events:
            now = number(event, "elapsed") or 0.0
            if event["phase"] == "opened":
                before = 0.0
            total, before = total + (now - before if now >= before else now), now
        return total

    @property
    def session(self) -> tuple[Event, ...]:
        """The events since the run was last started or gone on with."""
        first = max((index for index, event in enumerate(self.events) if event["phase"] == "opened"), default=0)
        return self.events[first:]

    @property
    def marks(self) -> list[float]:
        """Seconds into this session at which it began its rounds, and at which each was finished."""
        return [number(event, "elapsed") or 0.0 for event in self.session if event["phase"] in {"start", "merge"}]

    @property
    def pace(self) -> float | None:
        """Seconds from one finished round to the next, a mean of this session's; None before there is one."""
        marks = self.marks
        return (marks[-1] - marks[0]) / (len(marks) - 1) if len(marks) > 1 else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


def is_running(folder: Path) -> bool:
    """Whether a process writes a run directory: its metrics are locked by another opening of the file."""
    with (folder / METRICS).open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def find(folder: Path) -> list[Path]:
    """The run directories in a folder, the one that was written to last at the end."""
    return sorted((run for run in folder.iterdir() if is_run(run)), key=lambda run: (run / METRICS).stat().st_mtime)


def printable(text: str) -> str:
    """What another machine wrote, without anything that steers a terminal or hides in a page; line ends stay."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def number(facts: Mapping[str, Any], key: str) -> float | None:
    """A finite number under ``key``; None where there is none."""
    value = facts.get(key)
    counts = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if counts else None


def numbers(facts: object) -> dict[str, float]:
    """The finite numbers of a mapping."""
    found = {str(key): number(mapping(facts), key) for key in mapping(facts)}
    return {key: value for key, value in found.items() if value is not None}


def names(asked: Event) -> Iterator[str]:
    """The nodes that a round asked."""
    nodes = asked.get("nodes")
    return map(str, nodes if isinstance(nodes, list) else [])


def read_events(file: Path) -> tuple[tuple[Event, ...], int]:
    """The lines of the record that are whole, and how many are not."""
    events, torn = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("phase"), str) and isinstance(event.get("round"), int):
            events.append(event)
        else:
            torn += 1
    return tuple(events), torn


def _json(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is none, or one that was torn."""
    try:
        return mapping(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object; empty where it is something else."""
    return value if isinstance(value, dict) else {}
