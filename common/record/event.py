"""What every event of a run has; ``events.py`` has a class per phase."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from common.json_files import Object

# The axes, not figures.
AXES = {"round", "elapsed"}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in ``round``; ``elapsed`` is seconds since the record was opened, which sets it.

    By itself it stands for a phase that only another release knows.
    """

    phase: ClassVar[str] = ""
    round: int
    elapsed: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """Its numbers by name, as charts call them."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in AXES}
        return {name: value for name, value in own.items() if isinstance(value, int | float)}

    @property
    def crossed(self) -> Mapping[str, int]:
        """Bytes of adapters ``up`` and ``down`` that count with it; a node's own are in its round's."""
        return {}

    @classmethod
    def renewed(cls, line: Object) -> Object:
        """A line of release 0.1.0 as this one would have written it; one of this release unchanged."""
        return line


@dataclass(frozen=True, kw_only=True)
class OfNode(Event):
    """Something about one node, by its name."""

    node: str


@dataclass(frozen=True, kw_only=True)
class Crossing(Event):
    """Something for which adapters have crossed, in bytes over all nodes."""

    bytes_up: int
    bytes_down: int

    @property
    def crossed(self) -> Mapping[str, int]:
        return {"up": self.bytes_up, "down": self.bytes_down}


@dataclass(frozen=True, kw_only=True)
class Scored(Event):
    """A score on held-out examples by the task's ``metric``, its ``further`` figures, and the mean ``loss``."""

    metric: str
    score: float | None
    further: Mapping[str, float] | None = None
    loss: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        named = {} if self.score is None else {self.metric: self.score}
        plain = {name: value for name, value in super().figures.items() if name != "score"}
        return {**named, **(self.further or {}), **plain}

    @classmethod
    def renewed(cls, line: Object) -> Object:
        if "metric" in line:
            return line
        known = {"phase"} | {field.name for field in fields(cls)}
        named = {name: value for name, value in line.items() if name not in known}
        metric = next(iter(named), "")
        return {**line, "metric": metric, "score": named.pop(metric, None), "further": named}
