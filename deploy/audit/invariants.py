"""What must hold for every run, so that no statistics are needed: most faults of private training show here.

**Structure.** All that a node says for two neighbouring data sets is the same, but for the values that are noised.
**Stability.** One unit more in the data is one unit more to train on, and nothing else.
**Bound.** One unit more moves the sum of the clipped gradients by C at most.
**Noise.** What a step of no record adds has the deviation that is charged.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import Message, MessageType, RecordDict
from torch import Tensor, nn

from client_app.privacy import train_privately
from client_app.training import turn_of
from client_app.units import Unit
from common import tasks
from common.adapter.values import State
from common.config.ranges import LEAST_NOISE
from common.config.run import RunConfig
from common.privacy import accounting
from common.privacy.accounting import Release
from deploy.audit.canaries import Canary, Record
from deploy.audit.finding import Finding
from deploy.audit.node import Bench, Lines, Node
from strategies.objectives import Plain

SHORT: Mapping[str, Any] = {"train.steps": 1, "num-server-rounds": 1}
"""What is changed of the run where one step shows as much as many."""

SHOWN = 3
"""Of how many neighbours that broke a law each is told."""

SURE = 6.0
"""Deviations of an estimate beyond which it is no accident: one in five hundred million."""


@dataclass(frozen=True)
class Neighbour:
    """A data set with one unit more or less than another one, and what was done to it."""

    change: str
    lines: Lines


def neighbours(own: Sequence[Record], canaries: Sequence[Canary], unit: str) -> Iterator[Neighbour]:
    """Of a data set: each of ``canaries`` added, and the first and last unit taken away."""
    for canary in canaries:
        yield Neighbour(f"{canary.kind} added", [*own, *canary.records])
    for record in [*own[:1], *own[-1:]]:
        same = [other is record if unit == "record" else other.get(unit) == record.get(unit) for other in own]
        yield Neighbour("one taken away", [other for other, gone in zip(own, same, strict=True) if not gone])


def unreadable(own: Sequence[Record], config: RunConfig) -> Iterator[Neighbour]:
    """Of a data set: each with a line more that no task can use."""
    fields = tasks.build(config.task).fields()
    first = dict(own[0]) if own else {}
    for name, value in (("nothing", None), ("a number", 7), ("a list", []), ("a wrong label", config.task.labels)):
        yield Neighbour(f"{name} in every field added", [*own, {**first, **dict.fromkeys(fields, value)}])
    yield Neighbour("a record without fields added", [*own, {}])
    yield Neighbour("a line that is not JSON added", [*own, '{"text": '])


def structure(bench: Bench, own: Sequence[Record], others: Sequence[Neighbour]) -> Finding:
    """Compare everything that a node says, on each of ``others`` and on its ``own`` records."""
    expected = _said(bench.node(own, **SHORT))
    broken = [other.change for other in others if _said(bench.node(other.lines, **SHORT)) != expected]
    if broken:
        said = f"what it sends differs, in content or form, with {_few(broken)}"
    else:
        said = f"the same records, names, shapes, sizes and words for {len(others)} neighbouring data sets"
    return Finding("structure", not broken, said)


def stability(bench: Bench, own: Sequence[Record], others: Sequence[Neighbour]) -> Finding:
    """Compare what a node trains on, and is scored on."""

    def units(lines: Lines) -> Counter[str]:
        found = bench.node(lines).units
        parts = {"train": found.train, "score": found.heldout}
        return Counter(f"{part} {list(map(tuple, unit))}" for part, whole in parts.items() for unit in whole)

    before, moved = units(own), {}
    for other in others:
        after = units(other.lines)
        moved[other.change] = (after - before).total() + (before - after).total()
    worst = max(moved, key=lambda change: moved[change])
    if moved[worst] <= 1:
        said = f"one unit more or less changes what is trained on by one unit, {len(others)} times"
    else:
        said = f"{moved[worst]} of {before.total()} units change with {worst}, not one"
    return Finding("stability", moved[worst] <= 1, said)


def bound(node: Node, states: Mapping[str, State], companions: Sequence[Unit], others: Sequence[Canary]) -> Finding:
    """Add up the clipped gradients of ``companions`` with each of ``others`` and without, in each of ``states``.

    What is trained is ``node``'s, by its own loop: one step without noise in which everybody is.
    """
    clip, moved = node.config.privacy.clip, {}
    for name, state in states.items():
        without = clipped_sum(node, state, companions, Release(0.0, 1.0, 1))
        for canary in others:
            with_it = clipped_sum(node, state, [*companions, canary.unit], Release(0.0, 1.0, 1))
            moved[f"{canary.kind} {name}"] = float((with_it - without).norm()) / clip
    # A distance that is no number is no bound either.
    worst = max(moved, key=lambda change: moved[change] if math.isfinite(moved[change]) else math.inf)
    held = moved[worst] <= 1
    said = f"the sum moved by {moved[worst]:.4g} C at most ({worst}), {len(moved)} times"
    if not held:
        said = f"the sum moved by {moved[worst]:.4g} C ({worst}): {_what_it_means(node, moved[worst])}"
    return Finding("bound", held, said)


def noise(node: Node, state: State) -> Finding:
    """Measure the noise of a step in which nobody is."""
    planned = node.session.spending.plan()
    values = clipped_sum(node, state, (), Release(planned.noise_multiplier, planned.sample_rate, 1))
    share = float(values.square().mean().sqrt()) / (planned.noise_multiplier * node.config.privacy.clip)
    # More noise than is charged breaks no promise; the deviation of n values is right to 1 / sqrt(2 n) of itself.
    held = share >= 1 - SURE / math.sqrt(2 * len(values))
    said = f"{share:.4g} of what is charged, measured on {len(values):,} values"
    return Finding("noise", held, said if held else f"{said}: {_what_it_means(node, 1 / max(share, 1e-9))}")


def clipped_sum(node: Node, state: State, units: Sequence[Unit], release: Release) -> Tensor:
    """The sum of one step of a private round from ``state``, as one vector; noised if ``release`` is.

    An objective stands between a step's gradients and the step: there they are seen.
    """
    session = node.session
    found: list[Tensor] = []
    model, state = session.exchange.receive(node.message(MessageType.TRAIN, state))
    turn = turn_of(session.recipe, state, model.keys)
    train_privately(model, replace(session.recipe, objective=Watcher(found)), session.task, units, turn, release)
    return torch.cat(found) * node.config.privacy.expected_batch


@dataclass(frozen=True)
class Watcher(Plain):
    """Adds nothing to the loss, and keeps the gradients of each step in ``seen``."""

    seen: list[Tensor]

    def add(self, parameters: Sequence[nn.Parameter], *_: object) -> None:
        """Keep a copy: what follows in the step scales gradients in place."""
        self.seen.extend(p.grad.double().flatten().cpu() for p in parameters if p.grad is not None)


def _what_it_means(node: Node, factor: float) -> str:
    """Epsilon as it is charged, and with noise that counts for so many times less."""
    planned, privacy, rounds = node.session.spending.plan(), node.config.privacy, node.config.num_server_rounds

    def cost(multiplier: float) -> float:
        release = Release(multiplier, planned.sample_rate, planned.steps)
        return accounting.epsilon([release] * rounds, privacy.delta, privacy.accountant)

    real = planned.noise_multiplier / factor
    would = f"{cost(real):.3g}" if real >= LEAST_NOISE else "none at all"
    return f"epsilon {cost(planned.noise_multiplier):.3g} would be {would}"


def _said(node: Node) -> list[object]:
    """Everything that a node says to each kind of message, but for what noise covers."""
    state = node.initial()
    sent = [
        node.message(MessageType.QUERY),
        node.message(MessageType.TRAIN, state, score=True),
        node.message(MessageType.EVALUATE, state),
    ]
    return [_form(node, node.answer(message)) for message in sent]


def _form(node: Node, reply: Message) -> object:
    content: RecordDict = reply.content
    noised = {"merit", "count"} if node.config.privacy.score_noise else set[str]()
    arrays = {
        name: {key: array.data if key == "header" else (array.dtype, array.shape) for key, array in record.items()}
        for name, record in content.array_records.items()
        # With a mask, and where a rule cuts ranks off, sizes follow from the noised values.
        if "mask" not in record and not node.recipe.rule.shrinks
    }
    figures = {
        name: {key: None if key in noised else value for key, value in record.items()}
        for name, record in content.metric_records.items()
    }
    return sorted(content), arrays, figures, {name: dict(record) for name, record in content.config_records.items()}


def _few(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
