"""What a private node trains on: its units, each by itself, so that one more of them is one more and no failure tells.

A unit is what the promise is about: a record, or everything that the data holds of one person. A record that cannot be
used, whatever is wrong with it, counts as absent; how many those are stays in the node's own log.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.config.node import NodeConfig
from common.config.privacy import PrivacyConfig
from common.config.run import DataConfig, ModelConfig, TaskConfig
from common.models import base, lengths
from common.privacy.dataset import canonical
from common.sources import stable
from common.sources.fields import LeftOut
from common.sources.files import Stamp
from common.sources.records import Record
from common.tasks import Example, Task

Unit = Sequence[Example]
"""What the promise is about: one example of a record, or all of a person's."""


@dataclass(frozen=True)
class Units:
    """The units that a node trains on, and those that it is scored on, if it is."""

    train: Sequence[Unit]
    heldout: Sequence[Unit]


@dataclass(frozen=True)
class Wanted:
    """What of a run's config decides a node's units."""

    data: DataConfig
    task: TaskConfig
    model: ModelConfig
    privacy: PrivacyConfig
    seed: int
    stamp: Stamp = ()
    """The state of the files, so that a process that lives on does not go on with what an operator has replaced."""


@lru_cache(maxsize=8)
def node_units(wanted: Wanted, node: NodeConfig, number: int) -> Units:
    """Read, gather and tokenise once a process; ``number`` is the public one of the node's units.

    ``data.limit`` keeps a share ``limit / number`` of them: a limit in full would put one out for another. It does so
    where ``number`` is 0, for the neighbours of ``update-local``, of which nothing needs to be alike. Raises
    :class:`BouquetError` where there is no such source, and on nothing that stands in it.
    """
    data, privacy, seed = wanted.data, wanted.privacy, wanted.seed
    private = privacy.on
    task = lengths.built(
        lengths.bounded(wanted.task, wanted.model, private=private), wanted.model, node.data or data.source
    )
    tokenizer = base.load_tokenizer(wanted.model)
    # Under example-level privacy a record may be no more than one example.
    most = 1 if privacy.per_example else None
    share = min(1.0, data.limit / number) if data.limit and number else 1.0
    heldout = share * data.holdout if privacy.score_noise else 0.0
    read = stable.node_records(data, node, seed)
    found = sorted(_gathered(read, privacy, seed), key=lambda placed: placed[0])
    parts: dict[bool, list[Unit]] = {True: [], False: []}
    usable, outcomes = 0, Counter[str]()
    for place, unit in found if number else found[: data.limit or None]:
        if place >= share:
            continue
        examples = [_examples(record, task, tokenizer, most) for record in unit]
        usable += sum(map(bool, examples))
        outcomes.update(_outcome(record, own, task, tokenizer) for record, own in zip(unit, examples, strict=True))
        if whole := [example for own in examples for example in own]:
            parts[place < heldout].append(whole)
    others = "".join(f", {count} {outcome}" for outcome, count in sorted(outcomes.items()) if outcome)
    said = f"{usable} of {len(read)} records are used{others}; the coordinator is not told"
    print(f"{node.label}: {said}", file=sys.stderr)
    return Units(parts[False], parts[True])


def _gathered(found: Sequence[Record], privacy: PrivacyConfig, seed: int) -> Iterator[tuple[float, Sequence[Record]]]:
    """Every unit with a place from 0 to 1 that it alone decides; of a person's records at most ``unit_cap``."""
    if privacy.unit == "record":
        for record in found:
            yield stable.chance(record, f"place {seed}"), [record]
        return
    people: defaultdict[str, list[Record]] = defaultdict(list)
    for record in found:
        # Whoever's record cannot be told would be protected by nobody's bound; "7", 7 and " 7" are one.
        if person := _name(record.get(privacy.unit)):
            people[person].append(record)
    for person, own in people.items():
        chosen = sorted(own, key=lambda record: stable.chance(record, f"cap {seed}"))[: privacy.unit_cap]
        yield stable.chance({privacy.unit: person}, f"place {seed}"), chosen


def _name(value: Any) -> str:
    """What a field says whose record it is, in whatever form; nothing where it says nothing that can be read."""
    try:
        return canonical(value)
    except Exception:
        return ""


def _outcome(record: Record, own: Sequence[Example], task: Task, tokenizer: PreTrainedTokenizerBase) -> str:
    """What became of a record, for this machine's own log; nothing where it is used as it is."""
    if own:
        return f"cut at {task.length} tokens" if own[0].cut else ""
    try:
        task.encode(record, tokenizer)
    except LeftOut as reason:
        return str(reason)
    except Exception:
        return "broken"
    return ""


def _examples(record: Record, task: Task, tokenizer: PreTrainedTokenizerBase, most: int | None) -> list[Example]:
    """The examples in a record; none where it cannot be used, since an error would tell that it is there."""
    try:
        return task.encode(record, tokenizer)[:most]
    except Exception:
        return []
