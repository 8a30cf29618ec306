"""Keys of the run config that have other names now. An old one is read as the new one for two minor versions."""

from collections.abc import Mapping
from typing import Any

RENAMED: Mapping[str, tuple[str, ...]] = {
    "merge.mean": ("mean.name",),
    "merge.trim": ("mean.trimmed.share",),
    "merge.hostile": ("mean.krum.hostile",),
    "merge.optimizer": ("server-optimizer.name",),
    "merge.learning-rate": ("server-optimizer.momentum.rate", "server-optimizer.adam.rate"),
    "merge.momentum": ("server-optimizer.momentum.momentum", "server-optimizer.adam.momentum"),
    "merge.second-momentum": ("server-optimizer.adam.beta",),
    "merge.tau": ("server-optimizer.adam.tau",),
    "train.weight-decay": ("optimizer.adamw.weight-decay",),
    "train.proximal": ("objective.fedprox.mu",),
    "privacy.engine": ("gradient.name",),
    "rule.fed-sb.source": ("init.lora-sb.source",),
    "rule.fed-sb.examples": ("init.lora-sb.examples",),
    "rule.fed-sb.step": ("init.lora-sb.step",),
}
"""The new names of each old key; 0.1.0 had the old ones."""


def told(old: str) -> str:
    """What somebody hears who wrote an old key."""
    return f"{old} is called {' and '.join(RENAMED[old])} now."


def renamed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config under its keys of today; a new key that is there already stands."""
    found = {key: value for key, value in flat.items() if key not in RENAMED}
    if flat.get("rule.fed-sb.start") in ("drawn", "public"):
        found["rule.fed-sb.start"] = "init"
        # A comparison may have it beside other rules.
        if flat["rule.fed-sb.start"] == "public" and flat.get("rule.name") == "fed-sb":
            found.setdefault("init.name", "lora-sb")
    for old, news in RENAMED.items():
        if old not in flat or not _says_something(old, flat):
            continue
        for new in news:
            found.setdefault(new, "none" if flat[old] == "auto" else flat[old])
        if old == "train.proximal":
            found.setdefault("objective.name", "fedprox")
    return found


def _says_something(old: str, flat: Mapping[str, Any]) -> bool:
    """Whether an old key was used: some were off at 0, and the engine is for private runs alone."""
    if old in ("train.proximal", "merge.learning-rate"):
        return bool(flat[old])
    return old != "privacy.engine" or flat.get("privacy.mode") == "example"
