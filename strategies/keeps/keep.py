"""What a node keeps for itself, and how it joins that to what it receives: the contract."""

from dataclasses import dataclass
from typing import ClassVar

from common.adapter.values import HEAD, Key, Tensors
from common.method import Method


@dataclass(frozen=True, kw_only=True)
class Keep(Method):
    """``parts`` of the adapter that never leave the node; they replace those of what it receives."""

    section = "keep"
    parts: ClassVar[frozenset[str]]

    def keeps(self, key: Key) -> bool:
        """Whether a tensor is the node's own."""
        return key.part in self.parts

    def start(self, received: Tensors, kept: Tensors) -> Tensors:
        """Where a node starts: what it received, over it what it kept."""
        return {**received, **{key: tensor for key, tensor in kept.items() if self.keeps(key)}}

    def finish(self, received: Tensors, local: Tensors, kept: Tensors) -> Tensors:
        """What the node keeps of the tensors that it has trained."""
        return {key: tensor for key, tensor in local.items() if self.keeps(key)}

    @property
    def personal(self) -> bool:
        """Whether part of the adapter itself is each node's own, so that there is no global model."""
        return bool(self.parts - HEAD)
