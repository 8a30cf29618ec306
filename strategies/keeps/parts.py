"""Parts that stay with the node as they are."""

from dataclasses import dataclass

from common.adapter.structures import STRUCTURES
from common.adapter.values import HEAD
from strategies.keeps.keep import Keep


@dataclass(frozen=True, kw_only=True)
class Nothing(Keep):
    """Everything that is trained is shared."""

    name = "nothing"
    paper = "none"
    parts = frozenset()


@dataclass(frozen=True, kw_only=True)
class PersonalB(Keep):
    """B stays, as in FedSA-LoRA."""

    name = "b"
    paper = "arXiv:2410.01463"
    parts = frozenset({"B"})


@dataclass(frozen=True, kw_only=True)
class PersonalAdapter(Keep):
    """The adapter stays, whatever its structure."""

    name = "adapter"
    paper = "none"
    parts = frozenset().union(*(structure.parts for structure in STRUCTURES.values()))


@dataclass(frozen=True, kw_only=True)
class LocalHead(Keep):
    """A classification head stays (``task.head = "local"``), beside whatever else does."""

    name = "head"
    paper = "arXiv:1912.00818"
    parts = HEAD
