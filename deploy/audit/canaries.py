"""Canaries: records unlike all others, so that traces of them are easy to see.

A canary is what one of two neighbouring data sets has more: a record, or where a person is protected, all the records
of a person. They are made of the operator's own records, so that they have all their fields, and of the vocabulary.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client_app.units import Unit
from common import tasks
from common.config.run import RunConfig
from common.models import base, lengths
from deploy.audit.node import Bench

Record = Mapping[str, Any]

MISSES = 200
"""After so many candidates in a row that the node does not use, a kind is given up."""


@dataclass(frozen=True)
class Canary:
    """One canary: its records, and the unit that the node makes of them."""

    kind: str
    records: Sequence[Record]
    unit: Unit


class Maker:
    """Makes candidates of every kind, from a node's ``own`` records and the tokenizer of the run's model."""

    def __init__(self, config: RunConfig, own: Sequence[Record]) -> None:
        self._config = config
        self._own = own or [{}]
        self._tokenizer = base.load_tokenizer(config.model)
        self._random = random.Random()
        self._made = 0
        self._task = tasks.build(lengths.bounded(config.task, config.model, private=True))
        length = self._task.length
        self._kinds: dict[str, Callable[[], Record]] = {
            "random": lambda: self._filled(self._words(length // 2)),
            "mislabelled": self._mislabelled,
            "longest": lambda: self._filled(self._words(8 * length)),
            "repeated": lambda: self._filled(self._words(1) * length),
            "shortest": lambda: self._filled(self._words(1)),
        }

    @property
    def kinds(self) -> list[str]:
        """The names of the kinds: for each, what is written in the fields of the task."""
        return list(self._kinds)

    def make(self, kind: str) -> list[Record]:
        """A candidate: one record, or more than are read of one person."""
        self._made += 1
        privacy = self._config.privacy
        if privacy.unit == "record":
            return [self._kinds[kind]()]
        whose = {privacy.unit: f"canary {self._made} {self._random.getrandbits(32):x}"}
        return [{**self._kinds[kind](), **whose} for _ in range(privacy.unit_cap + 1)]

    def _filled(self, text: str) -> Record:
        """One of the own records, with ``text`` in the place of its own, and any label."""
        return {**self._random.choice(self._own), **self._task.written(text, self._words(4), self._random)}

    def _mislabelled(self) -> Record:
        """One of the own records, with what it teaches exchanged for something wrong."""
        record = self._own[self._made % len(self._own)]
        return {**record, **self._task.mislabelled(record, self._random.choice(self._own), self._random)}

    def _words(self, count: int) -> str:
        # Blanks are no text, and a record without one is left out.
        while True:
            tokens = self._random.choices(range(len(self._tokenizer)), k=count)
            if (words := str(self._tokenizer.decode(tokens, skip_special_tokens=True))).strip():
                return words


def usable(bench: Bench, maker: Maker, kind: str, wanted: int) -> list[Canary]:
    """Up to ``wanted`` canaries of a kind that the node trains on, each as one unit: an unread one would tell nothing.

    Fewer, or none, where :data:`MISSES` in a row are left out, as too short ones may be, or by ``data.limit``.
    """
    found: list[Canary] = []
    missed = 0
    while len(found) < wanted and missed < MISSES:
        records = maker.make(kind)
        units = bench.node(records).units.train
        if len(units) == 1:
            found.append(Canary(kind, records, units[0]))
        missed = 0 if len(units) == 1 else missed + 1
    return found
