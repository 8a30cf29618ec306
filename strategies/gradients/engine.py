"""The contract of an engine: per-example gradients added up by unit, each clipped, in one sum.

An engine has the gradient of every example i of a physical batch by every trained parameter, and adds up, over the
units u (a record, or a person with several),

    G_u = sum_(i of u) G_i        sum_u c_u G_u        c_u = min(1, C / |G_u|)

**Why no finite gradient is longer than C in the sum.** Gradients are float32, what is done with them is float64. There
no square overflows or vanishes, so a norm of n values is right to n 2^-53 of itself; and since a factor below
:data:`SMALLEST` counts as zero, no product is subnormal, each is right to 2^-53, and what is summed has that norm times
its factor, which is at most C.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from common.error import BouquetError

AUTO_S = 0.01
"""Gamma of AUTO-S: Bu et al., *Automatic Clipping*, arXiv:2206.07136."""

SMALLEST = 2.0**-800
"""The least factor that is applied: times the least float32, 2^-149, it is a normal float64 still."""

Clipping = Literal["flat", "automatic"]
Rows = Callable[[Tensor], Tensor]
"""Makes N x T x d of a packed 1 x S x d, and leaves anything else as it is."""


class Engine(AbstractContextManager["Engine"], ABC):
    """Sums the clipped gradients of units, over as many physical batches as there are.

    A context: on leaving it the network is as it was, but for the threshold of int8 layers. ``bound`` is the norm that
    no unit's gradient exceeds in the sum, over all trained parameters together; ``flat`` clipping scales down what is
    longer, ``automatic`` scales every gradient to (almost) that norm. With ``sequences`` every trained layer must see
    N x T x d, as in a language model: rows of N x d would be tokens there, and might be N by chance.
    """

    def __init__(self, network: nn.Module, bound: float, clipping: Clipping = "flat", sequences: bool = False) -> None:
        self.network = network
        self.bound = bound
        self.clipping = clipping
        self.parameters: dict[str, Tensor] = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._resting: frozenset[Tensor] = frozenset()
        self._total: dict[Tensor, Tensor] = {}
        self._surplus = self._batch_surplus = 0.0
        self._handles: list[Any] = []
        for module in network.modules():
            state: Any = getattr(module, "state", None)
            if hasattr(state, "threshold"):
                # On a GPU, the columns that LLM.int8 leaves in 16 bit are chosen over the whole batch.
                state.threshold = 0.0
        layers = {n: m for n, m in network.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
        self._install(layers)
        if sequences:
            self._handles += [layer.register_forward_pre_hook(_refuse_rows) for layer in layers.values()]

    def __exit__(self, *exception: object) -> None:
        """Take everything off the network."""
        self.network.zero_grad(set_to_none=True)
        for handle in self._handles:
            handle.remove()

    def add(self, losses: Tensor, units: Tensor | None = None, rows: Rows | None = None) -> None:
        """Add the clipped gradients of ``losses``; ``units`` (N, int64) says whose each of the batch's N rows is.

        Units are counted from 0, within this call; None makes each row, with the loss of its own, one. ``rows`` makes
        N x T x d of what a layer sees, where that is packed. A unit whose
        gradient is not finite, or too long to be scaled to the bound, counts as zero. All of it is added or, where
        this raises, nothing.

        Raises :class:`BouquetError` if a trainable parameter is not one of those that this engine covers, or a layer
        folds examples together; and whatever the backward pass raises.
        """
        self._check(parameter for parameter in self.network.parameters() if parameter.requires_grad)
        parts = {parameter: part.double() for parameter, part in self._sum(losses, units, rows).items()}
        for parameter, part in parts.items() if self._total else ():
            self._total[parameter] += part
        self._total = self._total or parts
        self._surplus += self._batch_surplus

    def take(self) -> dict[Tensor, Tensor]:
        """The sum in float64, zero where nothing was added, of all that does not rest; the next starts from zero."""
        total, self._total = self._total, {}
        return {
            parameter: total[parameter] if parameter in total else torch.zeros_like(parameter, dtype=torch.float64)
            for parameter in self.parameters.values()
            if parameter not in self._resting
        }

    def rest(self, resting: Iterable[Tensor]) -> None:
        """Leave these out of the sums from here on, and of the norms; whatever else rested is back."""
        self._resting = frozenset(resting)

    def take_surplus(self) -> float:
        """The sum over the units of 1/2 where a gradient was within the bound, and -1/2 where not; then from zero."""
        surplus, self._surplus = self._surplus, 0.0
        return surplus

    def forget(self) -> None:
        """Drop what a computation that broke off has left; the sum so far stays."""
        self.network.zero_grad(set_to_none=True)

    @abstractmethod
    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        """Prepare the ``layers`` that have trainable parameters of their own, by name."""

    @abstractmethod
    def _sum(self, losses: Tensor, units: Tensor | None, rows: Rows | None) -> Mapping[Tensor, Tensor]:
        """The sum over one physical batch."""

    def _clipped(self, gradients: Mapping[Tensor, Tensor], units: Tensor | None) -> dict[Tensor, Tensor]:
        """The sum over the units, from float32 gradients of ``N x shape of the parameter``."""
        if units is not None:
            gradients = {parameter: _by_unit(gradient, units) for parameter, gradient in gradients.items()}
        # In float32, squares vanish below 1e-23 and overflow above 1e19.
        parts = [vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) for gradient in gradients.values()]
        # Of a model that is split, they lie on several devices.
        norms = torch.stack([part.to(parts[0].device) for part in parts]).norm(dim=0)
        if not (finite := norms.isfinite()).all():
            for gradient in gradients.values():
                gradient[~finite.to(gradient.device)] = 0  # zero times NaN would be NaN
        self._batch_surplus = float((norms <= self.bound).sum()) - len(norms) / 2
        factors = self._factors(norms)
        return {p: torch.mv(g.flatten(1).T.double(), factors.to(g.device)).view_as(p) for p, g in gradients.items()}

    def _factors(self, norms: Tensor) -> Tensor:
        """What scales each unit's gradient, from its norm; both float64."""
        factors = self.bound / (norms + AUTO_S) if self.clipping == "automatic" else (self.bound / norms).clamp(max=1.0)
        return torch.where(norms.isfinite() & (factors >= SMALLEST), factors, 0.0)

    def _check(self, got: Iterable[Tensor]) -> None:
        """Raise :class:`BouquetError` unless these are the parameters that were trainable at first, and do not rest."""
        if different := set(got) ^ (set(self.parameters.values()) - self._resting):
            names = sorted(name for name, p in self.network.named_parameters() if p in different)
            raise BouquetError(
                f"{len(different)} trainable parameters without a per-example gradient, such as {names[0]}",
                where="privacy.mode = 'example'",
                expected="every trained parameter in the clipped sum, and no other",
                cure="Train linear layers only, and freeze or unfreeze nothing during a round.",
            )


class Unclipped(Engine):
    """No norm to keep: the ordinary gradient of the summed losses, to the bit."""

    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        pass

    def _sum(self, losses: Tensor, units: Tensor | None, rows: Rows | None) -> Mapping[Tensor, Tensor]:
        self.network.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.sum())
        return {p: p.grad for p in self.parameters.values() if p.grad is not None}


def _refuse_rows(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    if arguments[0].dim() < 3:
        raise folded("an input of N x T x d", arguments[0])


def folded(expected: str, got: Tensor) -> BouquetError:
    """The error of a layer by which the examples of a batch cannot be told apart."""
    return BouquetError(
        "a trained layer does not see one row an example",
        expected=expected,
        got=f"shape {tuple(got.shape)}",
        cure="This layer folds examples together: leave it out of lora.targets, or choose another model.",
    )


def _by_unit(gradients: Tensor, units: Tensor) -> Tensor:
    """Sums over the examples of each unit: ``U x ...`` from ``N x ...``."""
    sums = gradients.new_zeros(int(units.max()) + 1, *gradients.shape[1:])
    return sums.index_add_(0, units.to(gradients.device), gradients)
