"""The cells of a comparison: one run each."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from common.config.section import flatten
from deploy.compare.profile import BASELINES, Profile, Settings
from strategies import read_config
from strategies.recipe import own_models

# What a run is told beside its config, and may be told otherwise when it is resumed.
TRANSIENT = ("run-name", "run-directory", "resume", "min-nodes")


@dataclass(frozen=True)
class Cell:
    """One run: where it stands in the comparison, and its whole run config in Flower's flat form.

    ``rank`` is the comparison's; a rule may set another ``lora.rank`` for itself.
    """

    method: str
    partition: str
    rank: int
    privacy: str
    seed: int
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run's name: readable, and another one for another config."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode()).hexdigest()[:10]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', f'{self.method} {self.partition} s{self.seed}')}-{digest}"

    @property
    def label(self) -> str:
        """The cell in a line of progress."""
        privacy = f", {self.privacy}" if self.epsilon else ""
        return f"{self.method}, {self.partition}, rank {self.rank}{privacy}, seed {self.seed}"

    @property
    def epsilon(self) -> float | None:
        """What each node's examples cost; None where the run is not private."""
        return self.config["privacy.epsilon"] if self.config["privacy.mode"] != "none" else None

    @property
    def is_baseline(self) -> bool:
        """Whether this is what the rules are measured against."""
        return self.method in BASELINES


def cells(profile: Profile, over: Settings, quick: bool) -> list[Cell]:
    """All cells, in the order that they are run: seed by seed, so that a comparison broken off is a smaller one.

    ``quick`` takes the first two rules, the first of everything else, and the profile's ``quick`` settings.
    """
    last = dict(flatten(profile.quick)) if quick else {}
    first = slice(1 if quick else None)
    seeds, ranks = profile.seeds[first], profile.ranks[first]
    partitions, privacies = list(profile.partitions)[first], list(profile.privacy)[first]
    found: list[Cell] = []
    for seed, partition, rank, privacy in product(seeds, partitions, ranks, privacies):
        common = profile.base(over) | dict(flatten(profile.partitions[partition])) | {"lora.rank": rank, "seed": seed}
        common |= dict(flatten(profile.privacy[privacy]))
        private = common.get("privacy.mode", "none") != "none"
        for label, settings in _methods(profile, 2 if quick else None):
            if private and label in BASELINES:
                continue
            config = _complete(common | settings | last, profile.nodes)
            found.append(Cell(label, partition, rank, privacy, seed, config))
    return found


def _methods(profile: Profile, first: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The baselines and the rules, with what each lays over the rest.

    ``local`` is every node on its own. ``centralised`` is one model that sees all nodes' examples: in every round one
    node trains on them, as many steps as all nodes do together otherwise.
    """
    own = {label: dict(flatten(settings)) for label, settings in profile.baselines.items()}
    yield "local", {"rule.name": "local", "task.head": "local"} | own.get("local", {})
    pooled = {"rule.name": "fedit", "data.pooled": True, "fraction-train": 1 / profile.nodes}
    yield "centralised", pooled | own.get("centralised", {})
    for label in list(profile.rules)[:first]:
        yield label, profile.rule(label)


def _complete(flat: dict[str, Any], nodes: int) -> dict[str, Any]:
    """The whole run config, as the run will write it down. A model of its own on every node is scored there alone."""
    read = read_config(flat)
    config = read.to_flower()
    if config["data.pooled"]:
        config["train.steps"] *= nodes
    if own_models(read):
        config["evaluation.source"] = ""
    return {key: value for key, value in config.items() if key not in TRANSIENT}
