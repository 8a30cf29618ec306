"""Per-example gradients of the trained layers, added up by unit: their norms, and one sum of them, each clipped.

The fast engine is book-keeping (Bu et al., *Differentially Private Optimization on Large Foundation Models at Little
Cost*, arXiv:2210.00038) cut to LoRA. In the one backward pass a trained linear layer ``y = x W^T + b`` hands over its
input ``x`` (N x T x d_in) and the gradient of its output ``g`` (N x T x d_out) and leaves its ordinary weight gradient
out. From them come the per-example gradients and, of every unit u (a record, or a person with several),

    G_i = sum_t g_it x_it^T        G_u = sum_(i of u) G_i        sum_u c_u G_u        c_u = min(1, C / |G_u|)

which are small, because LoRA's factors are. Opacus's ``hooks`` stay selectable: they form the same gradients beside the
ordinary ones. Ghost clipping is not to be had: a crafted state pulls its norms and what it sums apart.

**Why no finite gradient is longer than C in the sum.** Gradients are float32, what is done with them is float64. There
no square overflows or vanishes, so a norm of n values is right to n 2^-53 of itself; and since a factor below
:data:`SMALLEST` counts as zero, no product is subnormal, each is right to 2^-53, and what is summed has that norm times
its factor, which is at most C.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.linalg import vector_norm

from client_app.recording import recorded
from common.error import BouquetError

AUTO_S = 0.01
"""Gamma of AUTO-S: Bu et al., *Automatic Clipping*, arXiv:2206.07136."""

SMALLEST = 2.0**-800
"""The least factor that is applied: times the least float32, 2^-149, it is a normal float64 still."""

Clipping = Literal["flat", "automatic"]


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
        self._total: dict[Tensor, Tensor] = {}
        self._surplus = self._batch_surplus = 0.0
        self._handles: list[Any] = []
        for module in network.modules():
            if isinstance(module, Linear8bitLt):
                # On a GPU, the columns that LLM.int8 leaves in 16 bit are chosen over the whole batch.
                module.state.threshold = 0.0
        layers = {n: m for n, m in network.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
        self._install(layers)
        if sequences:
            self._handles += [layer.register_forward_pre_hook(_refuse_rows) for layer in layers.values()]

    def __exit__(self, *exception: object) -> None:
        """Take everything off the network."""
        self.network.zero_grad(set_to_none=True)
        for handle in self._handles:
            handle.remove()

    def add(self, losses: Tensor, units: Tensor | None = None) -> None:
        """Add the clipped gradients of N ``losses``, one an example; ``units`` (N, int64) says whose each example is.

        Units are counted from 0, within this call; None makes each example its own. One whose gradient is not finite,
        or too long to be scaled to the bound, counts as zero. All of it is added or, where this raises, nothing.

        Raises :class:`BouquetError` if a trainable parameter is not one of those that this engine covers, or a layer
        folds examples together; and whatever the backward pass raises.
        """
        self._check(parameter for parameter in self.network.parameters() if parameter.requires_grad)
        parts = {parameter: part.double() for parameter, part in self._sum(losses, units).items()}
        for parameter, part in parts.items() if self._total else ():
            self._total[parameter] += part
        self._total = self._total or parts
        self._surplus += self._batch_surplus

    def take(self) -> dict[Tensor, Tensor]:
        """The sum in float64, zero where nothing was added; the next one starts from zero."""
        total, self._total = self._total, {}
        return {
            parameter: total[parameter] if parameter in total else torch.zeros_like(parameter, dtype=torch.float64)
            for parameter in self.parameters.values()
        }

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
    def _sum(self, losses: Tensor, units: Tensor | None) -> Mapping[Tensor, Tensor]:
        """The sum over one physical batch."""

    def _clipped(self, gradients: Mapping[Tensor, Tensor], units: Tensor | None) -> dict[Tensor, Tensor]:
        """The sum over the units, from float32 gradients of ``N x shape of the parameter``."""
        if units is not None:
            gradients = {parameter: _by_unit(gradient, units) for parameter, gradient in gradients.items()}
        # In float32, squares vanish below 1e-23 and overflow above 1e19.
        parts = [vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) for gradient in gradients.values()]
        norms = torch.stack(parts).norm(dim=0)
        if not (finite := norms.isfinite()).all():
            for gradient in gradients.values():
                gradient[~finite] = 0  # zero times NaN would be NaN
        self._batch_surplus = float((norms <= self.bound).sum()) - len(norms) / 2
        factors = self._factors(norms)
        return {p: torch.mv(g.flatten(1).T.double(), factors).view_as(p) for p, g in gradients.items()}

    def _factors(self, norms: Tensor) -> Tensor:
        """What scales each unit's gradient, from its norm; both float64."""
        factors = self.bound / (norms + AUTO_S) if self.clipping == "automatic" else (self.bound / norms).clamp(max=1.0)
        return torch.where(norms.isfinite() & (factors >= SMALLEST), factors, 0.0)

    def _check(self, got: Iterable[Tensor]) -> None:
        """Raise :class:`BouquetError` unless these are the parameters that were trainable at first."""
        if different := set(got) ^ set(self.parameters.values()):
            names = sorted(name for name, p in self.network.named_parameters() if p in different)
            raise BouquetError(
                f"{len(different)} trainable parameters without a per-example gradient, such as {names[0]}",
                where="privacy.mode = 'example'",
                expected="every trained parameter in the clipped sum, and no other",
                cure="Train linear layers only, and freeze or unfreeze nothing during a round.",
            )


class Fast(Engine):
    """One backward pass that forms per-example gradients in the place of the ordinary ones."""

    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        self._gradients: dict[Tensor, Tensor] = {}
        self._examples = 0
        self._layers: list[nn.Module] = []
        for name, module in layers.items():
            if type(module) is not nn.Linear or "forward" in vars(module):
                self.__exit__()
                raise BouquetError(
                    "a trained layer is not a plain linear layer",
                    where=name,
                    expected="torch.nn.Linear",
                    got=f"{type(module).__module__}.{type(module).__qualname__}",
                    cure="Train LoRA factors and linear heads only, or set privacy.engine = 'hooks'.",
                )
            module.forward = partial(recorded, module, self._record)  # type: ignore[method-assign]
            self._layers.append(module)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for module in self._layers:
            del module.forward
        self._layers.clear()

    def forget(self) -> None:
        super().forget()
        self._gradients = {}

    def _record(self, layer: nn.Linear, x: Tensor, g: Tensor) -> None:
        if len(x) != self._examples:
            raise _folded(f"an input of {self._examples} x ... x {layer.in_features}", x)
        x, g = (tensor.reshape(len(tensor), -1, tensor.shape[-1]).float() for tensor in (x, g))
        if layer.weight.requires_grad:
            self._keep(layer.weight, torch.bmm(g.mT, x))
        if layer.bias is not None and layer.bias.requires_grad:
            self._keep(layer.bias, g.sum(1))

    def _keep(self, parameter: Tensor, gradient: Tensor) -> None:
        # A layer that is used twice has one gradient: the parts are added before the norm is taken.
        if parameter in self._gradients:
            self._gradients[parameter] += gradient
        else:
            self._gradients[parameter] = gradient

    def _sum(self, losses: Tensor, units: Tensor | None) -> Mapping[Tensor, Tensor]:
        self._examples = len(losses)
        torch.autograd.backward(losses.sum())
        gradients, self._gradients = self._gradients, {}
        self._check(gradients)
        return self._clipped(gradients, units)


class Hooks(Engine):
    """Opacus's hooks: per-example gradients beside the ordinary ones, which are thrown away."""

    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        if any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules()):
            raise BouquetError(
                "Opacus's hooks do not work with gradient checkpointing",
                where="privacy.engine",
                expected="'fast', or model.gradient-checkpointing = false",
            )
        self._hooks: Any = GradSampleHooks(self.network, loss_reduction="sum")

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._hooks.cleanup()

    def forget(self) -> None:
        super().forget()
        self._hooks.cleanup()
        for module in self.network.modules():
            # What a forward pass that had no whole backward pass has left would be taken for the next one's.
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)
        self._hooks = GradSampleHooks(self.network, loss_reduction="sum")

    def _sum(self, losses: Tensor, units: Tensor | None) -> Mapping[Tensor, Tensor]:
        self.network.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # The first layers' inputs are embeddings, which need no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(losses.sum())
        samples = {p: getattr(p, "grad_sample", None) for p in self.parameters.values()}
        gradients = {parameter: sample.float() for parameter, sample in samples.items() if sample is not None}
        self._hooks.set_grad_sample_to_none()
        self._check(gradients)
        for gradient in gradients.values():
            if len(gradient) != len(losses):
                raise _folded(f"gradients of {len(losses)} examples", gradient)
        return self._clipped(gradients, units)


class Unclipped(Engine):
    """No norm to keep: the ordinary gradient of the summed losses, to the bit."""

    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        pass

    def _sum(self, losses: Tensor, units: Tensor | None) -> Mapping[Tensor, Tensor]:
        self.network.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.sum())
        return {p: p.grad for p in self.parameters.values() if p.grad is not None}


ENGINES: Mapping[str, type[Engine]] = {"fast": Fast, "hooks": Hooks}


def attach(name: str, network: nn.Module, bound: float, clipping: Clipping = "flat", sequences: bool = False) -> Engine:
    """The engine of this name on ``network``, whose trainable parameters are set; none is needed for no bound."""
    return (Unclipped if math.isinf(bound) else ENGINES[name])(network, bound, clipping, sequences)


def _refuse_rows(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    if arguments[0].dim() < 3:
        raise _folded("an input of N x T x d", arguments[0])


def _folded(expected: str, got: Tensor) -> BouquetError:
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
