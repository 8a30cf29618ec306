"""The contract of a node's optimizer: how it steps, from gradients that are clipped and noised already."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from common.adapter.structure import Pair, Structure
from common.method import Method


class Group(NamedTuple):
    """Parameters, and the learning rate that is theirs."""

    parameters: Sequence[nn.Parameter]
    rate: float


@dataclass(frozen=True, kw_only=True)
class Optimizer(Method):
    """Builds a torch optimizer, fresh in every round."""

    section = "optimizer"
    pairwise: ClassVar[bool] = False
    """Whether it looks at a layer's two factors together, and so wants a plain LoRA."""
    denoises: ClassVar[bool] = False
    """Whether it is about the noise in a step's gradients, and so wants some."""

    @classmethod
    def knows(cls, structure: Structure) -> bool:
        """Whether it can step along the gradients of a structure."""
        return structure.plain or not cls.pairwise

    @abstractmethod
    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        """The optimizer of what is trained: of the ``adapter``, whose factors are also in ``pairs``, and the ``head``.

        Either group may be empty.
        """

    def denoised(self, gradient: Tensor, deviation: float) -> Tensor:
        """A gradient as the step begins with it, which has noise of that standard deviation in each value."""
        return gradient

    @classmethod
    def rests(cls, step: int) -> frozenset[str]:
        """The parts that are not trained in a step of a round, counted from 0."""
        return frozenset()

    @classmethod
    def alternates(cls) -> bool:
        """Whether it trains a layer's factors in turns, and so wants both to be trained."""
        return bool(cls.rests(0))
