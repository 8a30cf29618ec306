"""A run directory, read.

``server_app/record.py`` writes it. A run may be under way, broken off, gone on with, or older than this code, so
anything may be missing: what is not there is empty or None, and a line that cannot be read is counted and passed over.
"""

import fcntl
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from common import disk
from common.error import BouquetError

DEFAULT_DIRECTORY = Path.home() / ".bouquet" / "runs"
CONFIG, METRICS, SUMMARY, SAID, CHECKPOINTS = "config.json", "metrics.jsonl", "summary.json", "run.log", "checkpoints"

AS_ASKED, TOO_FEW, BROKEN_OFF = "as asked", "too few nodes", "broken off"
"""How a run has ended, in its summary and in the event that says why it was stopped."""

Event = dict[str, Any]
RunState = Literal["running", "finished", "broken off"]

# What every line of scores has beside the score itself.
BESIDE_THE_SCORE = {"phase", "round", "elapsed", "loss", "seconds"}
# Lines of the record that are parsed in one call.
READ_TOGETHER = 1000
# What an attempt at a round leaves that the next attempt makes void.
OF_AN_ATTEMPT = {"train", "merge", "aggregation-error", "against", "camps"}


class Tally:
    """What the events of a run add up to, whichever session wrote them; terminal, summary and report say it.

    ``crossed`` are the bytes of adapters ``up`` and ``down``: of training, of rounds that did not count, of scoring.
    ``failures`` and ``late`` replies are by node.
    """

    def __init__(self) -> None:
        self.crossed = {"up": 0, "down": 0}
        self.failures: Counter[str] = Counter()
        self.late: Counter[str] = Counter()

    def hear(self, event: Mapping[str, Any]) -> None:
        """Add one event."""
        if "node" not in event:  # a node's own bytes are in its round's
            for way in self.crossed:
                self.crossed[way] += int(number(event, f"bytes_{way}") or 0)
        elif event["phase"] in {"failure", "late"}:
            (self.failures if event["phase"] == "failure" else self.late)[str(event["node"])] += 1


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
    def too_few(self) -> bool:
        """Whether it ended because too few nodes were there."""
        return bool(self.events) and self.events[-1].get("ended") == TOO_FEW

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

    @property
    def exported(self) -> int:
        """The round whose model it has left; the last one that is finished where that is not known."""
        return int(number(self.summary, "rounds") or self.done)

    @cached_property
    def counted(self) -> tuple[Event, ...]:
        """The events that count: of a round that was tried or run again, those of the last time."""
        kept: list[Event | None] = []
        # Where the events of the last attempt at each round are.
        attempts: dict[int, list[int]] = {}
        for event in self.events:
            phase, turn = event["phase"], event["round"]
            if phase == "asked":
                for place in attempts.pop(turn, []):
                    kept[place] = None
            elif phase == "start":
                kept = [old if old and (old["round"] <= turn or old["phase"] == "failure") else None for old in kept]
            if phase in OF_AN_ATTEMPT:
                attempts.setdefault(turn, []).append(len(kept))
            kept.append(event)
        return tuple(event for event in kept if event is not None)

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

    @cached_property
    def tally(self) -> Tally:
        """Bytes, failures and late replies of the whole run."""
        tally = Tally()
        for event in self.events:
            tally.hear(event)
        return tally

    def trained(self, way: str, *, by_formula: bool = False) -> float:
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


def name_of_now(number: int) -> str:
    """The name of a run that was given none: the time, and the end of a ``number`` of its own."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{number % 10**6:06d}"


def make_folder(folder: Path, *, resume: bool) -> None:
    """The directory of a run to come.

    Raises :class:`BouquetError` where another run is, unless it is gone on with, and where the disk does not take it.
    """
    if (folder / CHECKPOINTS).is_dir() and not resume:
        raise BouquetError(
            "there is a run of this name already",
            where=str(folder),
            cure="Choose another run-name, or set resume = true to continue it.",
        )
    with disk.writing("a run directory", folder, "Choose another run-directory (bouquet run --directory) or run-name."):
        folder.mkdir(parents=True, exist_ok=True)


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
    events: list[Event] = []
    torn = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        while some := list(islice(lines, READ_TOGETHER)):
            for event in _parsed(some):
                if (
                    isinstance(event, dict)
                    and isinstance(event.get("phase"), str)
                    and isinstance(event.get("round"), int)
                ):
                    events.append(event)
                else:
                    torn += 1
    return tuple(events), torn


def _parsed(lines: Sequence[str]) -> list[Any]:
    """The JSON of each line, None for one that is not whole.

    Together, they are read faster and have their keys in common; that fails where one is torn.
    """
    try:
        together = json.loads(f"[{','.join(lines)}]")
    except json.JSONDecodeError:
        together = []
    return together if len(together) == len(lines) else [_one(line) for line in lines]


def _one(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _json(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is none, or one that was torn."""
    try:
        return mapping(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object; empty where it is something else."""
    return value if isinstance(value, dict) else {}
