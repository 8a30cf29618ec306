"""Ranks by layer: fewer slots where a pattern says so, as PEFT's ``rank_pattern`` does.

``q_proj=4,layers.0.mlp=2`` gives four slots to every layer whose name has ``q_proj`` among its parts, and two to those
under ``layers.0.mlp``; the first pattern that fits counts, and other layers have the run's rank. A pattern is names and
no regular expression, as in PEFT, since a node reads it from whoever runs the federation. Every layer keeps the scale
of the run, where PEFT divides alpha by each layer's own rank.
"""

import re
from collections.abc import Collection

from common.error import BouquetError

WHERE = "lora.rank-pattern"
PATTERN = re.compile(r"[\w.]+=[1-9][0-9]{0,4}")
EXPECTED = "names of layers with their ranks, such as q_proj=4,mlp=2"


def is_pattern(text: str) -> bool:
    """Whether a text is such a pattern, or empty."""
    return not text or all(map(PATTERN.fullmatch, text.split(",")))


def read(pattern: str) -> dict[str, int]:
    """The rank of each name in a pattern."""
    found: dict[str, int] = {}
    for name, rank in (part.split("=") for part in pattern.split(",") if part):
        found.setdefault(name, int(rank))
    return found


def by_layer(pattern: str, layers: Collection[str], rank: int) -> dict[str, int]:
    """The layers that have fewer slots than ``rank``, and how many.

    Raises :class:`BouquetError` for a name that fits no layer, and where no layer has the whole rank.
    """
    named, found = read(pattern), dict[str, int]()
    for name in named:
        if not any(_fits(name, layer) for layer in layers):
            raise BouquetError("a rank for a layer that is not adapted", where=WHERE, expected=EXPECTED, got=name)
    for layer in layers:
        cap = next((cap for name, cap in named.items() if _fits(name, layer)), rank)
        if cap < rank:
            found[layer] = cap
    if len(found) == len(layers):
        most = max(found.values())
        raise BouquetError(
            "every layer has fewer slots than the run's rank",
            where=WHERE,
            expected="a layer that the pattern leaves alone",
            got=f"at most {most}, where lora.rank is {rank}",
            cure=f"Set lora.rank = {most}, or leave a layer out of the pattern.",
        )
    return found


def _fits(name: str, layer: str) -> bool:
    return f".{name}." in f".{layer}."
