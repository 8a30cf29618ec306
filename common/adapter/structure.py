"""The contract of a structure: which tensors stand beside a frozen layer, and what they are as one LoRA.

Shapes, for one adapted linear layer with weight ``d_out x d_in``:

    A  r x d_in    B  d_out x r      the factors of every structure; the layer computes W x + s B A x, or more
    Q  d_out x q   P  q x d_in       the frozen offset, scale 1; the layer adds Q P x
    W  d_out x d_in   b  d_out       a head layer, trained in full
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from common.adapter.values import FACTORS, Key, LayerShape, Tensors
from common.method import Method

Shape = tuple[int, ...]

LORA = "LORA"
"""PEFT's name of the form that holds A and B, and an offset stacked on them."""


class Pair(NamedTuple):
    """The factors of one layer, which adds ``scale B A x``; one that is frozen has no gradient."""

    b: nn.Parameter
    a: nn.Parameter
    scale: float


@dataclass(frozen=True, kw_only=True)
class Structure(Method):
    """What is injected into every adapted layer. All of its tensors are told apart by their part alone."""

    section = "adapter"
    parts: ClassVar[frozenset[str]]
    trained: ClassVar[frozenset[str]]
    """The parts that a rule trains which has no other plan."""
    linear_in: ClassVar[frozenset[frozenset[str]]]
    """Sets of parts in which, the others being fixed, the update of a layer is linear."""
    measured: ClassVar[frozenset[str]] = frozenset()
    """Parts that :meth:`measure` takes from the frozen weight, at the start, on the coordinator."""
    loose: ClassVar[frozenset[str]] = frozenset()
    """Parts that are no linear layer's weight or diagonal, so that no single example has a gradient by them."""
    cored: ClassVar[bool] = True
    """Whether it starts with what an init puts between the factors."""
    nested: ClassVar[bool] = False
    """Whether it trains leading slots without the others, and so wants a start that adds nothing."""
    init: ClassVar[str] = "drawn"
    """Where it starts, by the name of an init, unless the rule or the run config names another."""
    form: ClassVar[str] = LORA
    """What PEFT keeps it as, by PEFT's name. Any other than a LoRA has no place for an offset beside it."""
    unloadable: ClassVar[frozenset[str]] = frozenset()
    """How a base may be held (``model.quantization``) so that PEFT does not load that form over it."""
    learning_rate: ClassVar[float] = 5e-3
    """What it trains at unless the rule or the run config names another rate: one at which the default rounds learn."""
    optimizer: ClassVar[str] = "adamw"
    """How a node steps in it, by the name of an optimizer, unless the run config names another."""
    gradient: ClassVar[str] = "backward"
    """How the gradient of a batch by what it trains is found, by the name of a member of that axis."""
    own_steps: ClassVar[bool] = False
    """Whether what a step trains is drawn by each node for itself."""

    @abstractmethod
    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        """The parts of one layer and their shapes, A and B first. Raises :class:`BouquetError` for a misfit rank."""

    @abstractmethod
    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        """The parts of one layer that starts from B (``d_out x r``) and A (``r x d_in``).

        ``core`` (r x r) is what an init wants between them: the update of the layer is then B core A. Where it is None
        it is B A, but for a structure that trains something between the two, which starts at nothing.
        """

    def measure(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The :attr:`measured` parts of one layer, from its frozen weight (``d_out x d_in``)."""
        return {}

    @abstractmethod
    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        """The layer's update as a plain LoRA: ``d_out x r`` and ``r x d_in``, whose product the scale multiplies.

        Of another :attr:`form` the update depends on the frozen weight, which a coordinator need not have. It is then
        that of a weight whose rows are alike: enough to tell whether there is any, and how far two are apart.
        """

    @abstractmethod
    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        """Put the structure into a layer of PEFT's; the parameters of each part, one below the other."""

    def common(self) -> Tensors:
        """The tensors that all layers have in common, as they start; most structures have none."""
        return {}

    def join(self, modules: Mapping[str, Any]) -> dict[Key, list[nn.Parameter]]:
        """Put these into PEFT's layers, by name, each of which it was injected into; the parameters of each tensor."""
        return {}

    def step(self, module: Any, draw: int) -> None:
        """Prepare a layer that it was injected into for a step; ``draw`` is a random number.

        All nodes share it, unless they take :attr:`own_steps`.
        """
        return

    @property
    def plain(self) -> bool:
        """Whether it trains the factors of a LoRA and nothing else."""
        return self.trained == self.parts == FACTORS

    def chosen(self, key: Key, tensor: Tensor, slots: Sequence[int]) -> Tensor:
        """Of a tensor that has slots of its own, those that are named; any other, or without names, as it is."""
        return tensor
