"""The events of a run: a dataclass per phase, each a line of ``metrics.jsonl``.

A line holds ``phase``, ``round``, ``elapsed`` and the phase's own fields. What an event says is checked where it is
made; what a line says is read with tolerance, since another release may have written it, or a node may be quoted in it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from common.json_files import Object, filled, written
from common.record.event import Crossing, Event, OfNode, Scored
from common.sources.counts import Counts


@dataclass(frozen=True, kw_only=True)
class Opened(Event):
    """The record was opened at a ``time`` in UTC: the run was started, or resumed."""

    phase: ClassVar[str] = "opened"
    time: str


@dataclass(frozen=True, kw_only=True)
class RuleFacts:
    """What a rule says of itself."""

    paper: str
    exact: bool
    personal: bool
    learning_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Start(Event):
    """The rounds after ``round`` begin, over so many ``layers``; ``names`` of nodes are proven or claimed."""

    phase: ClassVar[str] = "start"
    rule: RuleFacts
    layers: int
    nodes: tuple[str, ...]
    names: str


@dataclass(frozen=True, kw_only=True)
class Data(OfNode):
    """What became of the records of a node."""

    phase: ClassVar[str] = "data"
    counts: Counts

    @property
    def figures(self) -> dict[str, float]:
        return dict(self.counts.numbers())


@dataclass(frozen=True, kw_only=True)
class Asked(Event):
    """The nodes that an attempt at a round asks."""

    phase: ClassVar[str] = "asked"
    nodes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Train(OfNode):
    """An update that has come and may be merged; a private node tells no figure of its own."""

    phase: ClassVar[str] = "train"
    bytes_up: int
    bytes_down: int
    norm: float | None = None
    weight: float | None = None
    loss: float | None = None
    steps: float | None = None
    tokens: float | None = None
    examples: float | None = None
    seconds: float | None = None
    peak_memory: float | None = None

    @classmethod
    def renewed(cls, line: Object) -> Object:
        return {"peak_memory": line.get("peak-memory"), **line}


@dataclass(frozen=True, kw_only=True)
class Against(OfNode):
    """A node whose change points against the others', with the ``cosine`` between them."""

    phase: ClassVar[str] = "against"
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Camps(Event):
    """The nodes fall in two camps: ``smaller`` of ``nodes`` go against the others."""

    phase: ClassVar[str] = "camps"
    smaller: int
    nodes: int


@dataclass(frozen=True, kw_only=True)
class Void(Crossing):
    """An attempt at a round that does not count: ``replies`` came of ``asked``, and ``needed`` are more."""

    phase: ClassVar[str] = "void"
    asked: int
    replies: int
    needed: int


@dataclass(frozen=True, kw_only=True)
class Dropped(Crossing):
    """A round that is not merged: the scores that came with its ``replies`` ended the run before it."""

    phase: ClassVar[str] = "dropped"
    asked: int
    replies: int


@dataclass(frozen=True, kw_only=True)
class Merge(Crossing):
    """A round that counts: the updates of ``nodes`` of those ``asked`` were merged.

    ``formula_up`` and ``formula_down`` are the bytes of the values that the rule sends, ``phases`` the seconds of each
    part of the round, ``peak_memory`` the coordinator's in bytes.
    """

    phase: ClassVar[str] = "merge"
    nodes: int
    asked: int
    loss: float | None = None
    seconds: float
    phases: Mapping[str, float]
    formula_up: float
    formula_down: float
    peak_memory: float | None

    @property
    def formula(self) -> Mapping[str, float]:
        """Bytes ``up`` and ``down`` of the values that the rule sends."""
        return {"up": self.formula_up, "down": self.formula_down}


@dataclass(frozen=True, kw_only=True)
class AggregationError(Event):
    """What share of the nodes' mean update a merge has lost, ``overall`` and in each of the ``layers``."""

    phase: ClassVar[str] = "aggregation-error"
    overall: float | None
    layers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluate(OfNode, Scored):
    """A node's score of a state; of ``count`` examples or tokens, ``correct`` are right."""

    phase: ClassVar[str] = "evaluate"
    count: float | None = None
    correct: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Event):
    """A state was sent to the nodes ``asked`` to score it, and not to train from it as well."""

    phase: ClassVar[str] = "evaluation"
    asked: int
    bytes_down: int
    seconds: float

    @property
    def crossed(self) -> Mapping[str, int]:
        return {"down": self.bytes_down}


@dataclass(frozen=True, kw_only=True)
class Implausible(OfNode):
    """A node that counts far more examples than the others, and is left out of the overall score."""

    phase: ClassVar[str] = "implausible"
    count: int


@dataclass(frozen=True, kw_only=True)
class HeldOut(Scored):
    """The score over all nodes; ``classes`` has the ``share`` and the ``recall`` of each class by its name."""

    phase: ClassVar[str] = "heldout"
    classes: Mapping[str, Mapping[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Judged(Event):
    """The held-out loss ``by`` which this round is known, and the nodes' own, which are compared with other rounds'."""

    phase: ClassVar[str] = "judged"
    by: float | None
    losses: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Central(Scored):
    """The score on the coordinator's own examples."""

    phase: ClassVar[str] = "central"
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Chosen(Event):
    """Its round is exported in the place of the ``last``."""

    phase: ClassVar[str] = "chosen"
    last: int


@dataclass(frozen=True, kw_only=True)
class Stalled(Event):
    """The run ended where it began, as ``said``."""

    phase: ClassVar[str] = "stalled"
    said: str


@dataclass(frozen=True, kw_only=True)
class Failure(OfNode):
    """A node that could not do its part ``during`` a phase, and why."""

    phase: ClassVar[str] = "failure"
    during: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Late(OfNode):
    """A reply that came after its deadline."""

    phase: ClassVar[str] = "late"
    during: str


@dataclass(frozen=True, kw_only=True)
class SitOut(OfNode):
    """A node that is left out for so many ``rounds``, after so many ``failures`` in a row."""

    phase: ClassVar[str] = "sit-out"
    failures: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run was broken off: how it ``ended``, and the reason."""

    phase: ClassVar[str] = "stopped"
    ended: str
    reason: str


PHASES: Mapping[str, type[Event]] = {
    kind.phase: kind
    for kind in (
        *(Opened, Start, Data, Asked, Train, Against, Camps, Void, Dropped, Merge, AggregationError),
        *(Evaluate, Evaluation, Implausible, HeldOut, Judged, Central, Chosen, Stalled, Failure, Late, SitOut, Stopped),
    )
}


def to_line(event: Event) -> str:
    """The event as a line of JSON, without its end."""
    return json.dumps({"phase": event.phase, **written(event)})


def from_line(line: Object) -> Event | None:
    """The event of a line; None where it is none. Of a phase that this release does not know, no more than its time."""
    phase, turn = line.get("phase"), line.get("round")
    if not isinstance(phase, str) or not isinstance(turn, int):
        return None
    kind = PHASES.get(phase, Event)
    return filled(kind, kind.renewed(line))
