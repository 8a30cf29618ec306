"""Per-example gradients of the trained layers: their norms, and one sum of them, each clipped.

The fast engine is book-keeping (Bu et al., *Differentially Private Optimization on Large Foundation Models at Little
Cost*, arXiv:2210.00038) cut to LoRA. In the one backward pass a trained linear layer ``y = x W^T + b`` hands over its
input ``x`` (N x T x d_in) and the gradient of its output ``g`` (N x T x d_out) and leaves its ordinary weight gradient
out. From them come the per-example gradients

    G_i = sum_t g_it x_it^T        |G_i|^2        sum_i c_i G_i        c_i = min(1, C / |G_i|)

which are small, because LoRA's factors are. Opacus's own two ways stay selectable: ``hooks`` forms the same gradients
beside the ordinary ones; ``ghost`` has the norms without the gradients, and needs a second backward pass.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Self

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn
from torch.nn.functional import linear

from common.error import BouquetError

AUTO_S = 0.01
"""Gamma of AUTO-S: Bu et al., *Automatic Clipping*, arXiv:2206.07136."""

Clipping = Literal["flat", "automatic"]


class Engine(ABC):
    """Sums the clipped gradients of examples, over as many physical batches as there are.

    A context: on leaving it the network is as it was (but see :func:`_keep_apart` for int8). ``bound`` is the norm that
    no example's gradient exceeds in the sum, over all trained parameters together; ``flat`` clipping scales down what
    is longer, ``automatic`` scales every gradient to (almost) that norm.
    """

    def __init__(self, network: nn.Module, bound: float, clipping: Clipping = "flat") -> None:
        self.network = network
        self.bound = bound
        self.clipping = clipping
        self.parameters: dict[str, Tensor] = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._total: dict[Tensor, Tensor] = {}
        _keep_apart(network)

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *exception: object) -> None:
        """Take everything off the network."""

    def add(self, losses: Tensor) -> None:
        """Add the clipped gradients of N ``losses``, one an example. One that is not finite counts as zero.

        Raises :class:`BouquetError` if a trainable parameter is not one of those that this engine covers.
        """
        trainable = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self._check(trainable.values(), self.parameters.values())
        for parameter, part in self._sum(losses).items():
            if parameter in self._total:
                self._total[parameter] += part
            else:
                self._total[parameter] = part.double()

    def take(self) -> dict[Tensor, Tensor]:
        """The sum in float64, zero where nothing was added; the next one starts from zero."""
        total, self._total = self._total, {}
        return {
            parameter: total[parameter] if parameter in total else torch.zeros_like(parameter, dtype=torch.float64)
            for parameter in self.parameters.values()
        }

    @abstractmethod
    def _sum(self, losses: Tensor) -> Mapping[Tensor, Tensor]:
        """The sum over one physical batch."""

    def _factors(self, squares: Tensor) -> Tensor:
        """What scales each example's gradient, from its squared norm."""
        norms = squares.sqrt()
        factors = self.bound / (norms + AUTO_S) if self.clipping == "automatic" else (self.bound / norms).clamp(max=1.0)
        return torch.where(norms.isfinite(), factors, 0.0)

    def _check(self, got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
        """Raise :class:`BouquetError` unless both are the same parameters."""
        if different := set(got) ^ set(expected):
            names = sorted(name for name, p in self.network.named_parameters() if p in different)
            raise BouquetError(
                f"{len(different)} trainable parameters without a per-example gradient, such as {names[0]}",
                where="privacy.mode = 'example'",
                expected="every trained parameter in the clipped sum, and no other",
                cure="Train linear layers only, and freeze or unfreeze nothing during a round.",
            )


class Fast(Engine):
    """One backward pass that forms per-example gradients in the place of the ordinary ones."""

    def __init__(self, network: nn.Module, bound: float, clipping: Clipping = "flat") -> None:
        super().__init__(network, bound, clipping)
        self._gradients: dict[Tensor, Tensor] = {}
        self._examples = 0
        self._layers: list[nn.Module] = []
        for name, module in network.named_modules():
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            if type(module) is not nn.Linear or "forward" in vars(module):
                self.__exit__()
                raise BouquetError(
                    "a trained layer is not a plain linear layer",
                    where=name,
                    expected="torch.nn.Linear",
                    got=f"{type(module).__module__}.{type(module).__qualname__}",
                    cure="Train LoRA factors and linear heads only, or set privacy.engine = 'hooks'.",
                )
            module.forward = partial(_forward, module, self._record)  # type: ignore[method-assign]
            self._layers.append(module)

    def __exit__(self, *exception: object) -> None:
        for module in self._layers:
            del module.forward
        self._layers.clear()

    def _record(self, layer: nn.Linear, x: Tensor, g: Tensor) -> None:
        if len(x) != self._examples:
            raise BouquetError(
                "a trained layer does not see one row an example",
                expected=f"an input of {self._examples} x ... x {layer.in_features}",
                got=f"shape {tuple(x.shape)}",
                cure="This model folds examples together; it cannot be trained with privacy.mode = 'example'.",
            )
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

    def _sum(self, losses: Tensor) -> Mapping[Tensor, Tensor]:
        self._examples = len(losses)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients, self._gradients = self._gradients, {}
        self._check(gradients, self.parameters.values())
        return _weighted_sum(gradients, self._factors)


class OpacusEngine(Engine):
    """What Opacus's two ways have in common. Its hooks find no activation where gradient checkpointing drops them."""

    hooks: type[Any]

    def __init__(self, network: nn.Module, bound: float, clipping: Clipping = "flat") -> None:
        super().__init__(network, bound, clipping)
        if any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
            raise BouquetError(
                "Opacus's engines do not work with gradient checkpointing",
                where="privacy.engine",
                expected="'fast', or model.gradient-checkpointing = false",
            )
        self._hooks: Any = self.hooks(network, loss_reduction="sum")

    def __exit__(self, *exception: object) -> None:
        self._hooks.cleanup()

    def _backward(self, loss: Tensor, **options: bool) -> None:
        self.network.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # The first layers' inputs are embeddings, which need no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward(**options)  # type: ignore[no-untyped-call]


class Hooks(OpacusEngine):
    """Opacus's hooks: per-example gradients beside the ordinary ones, which are thrown away."""

    hooks = GradSampleHooks

    def _sum(self, losses: Tensor) -> Mapping[Tensor, Tensor]:
        self._backward(losses.sum())
        gradients: dict[Tensor, Tensor] = {p: p.grad_sample for p in self.parameters.values()}  # type: ignore[attr-defined]
        self._hooks.set_grad_sample_to_none()
        return _weighted_sum(gradients, self._factors)


class Ghost(OpacusEngine):
    """Opacus's ghost clipping: one backward pass for the norms, one for the sum of the scaled losses."""

    hooks = GradSampleHooksFastGradientClipping

    def _sum(self, losses: Tensor) -> Mapping[Tensor, Tensor]:
        self._backward(losses.sum(), retain_graph=True)
        squares = self._hooks.get_norm_sample().pow(2)
        if not squares.isfinite().all():
            raise BouquetError(
                "ghost clipping cannot leave out an example whose gradient is not finite",
                where="privacy.engine = 'ghost'",
                cure="Set privacy.engine = 'fast' or 'hooks'.",
            )
        self._hooks.disable_hooks()
        self._backward((losses * self._factors(squares)).sum())
        self._hooks.enable_hooks()
        return {p: p.grad for p in self.parameters.values() if p.grad is not None}


class Unclipped(Engine):
    """No norm to keep: the ordinary gradient of the summed losses, to the bit."""

    def __exit__(self, *exception: object) -> None:
        self.network.zero_grad(set_to_none=True)

    def _sum(self, losses: Tensor) -> Mapping[Tensor, Tensor]:
        self.network.zero_grad(set_to_none=True)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return {p: p.grad for p in self.parameters.values() if p.grad is not None}


ENGINES: Mapping[str, type[Engine]] = {"fast": Fast, "hooks": Hooks, "ghost": Ghost}


def attach(name: str, network: nn.Module, bound: float, clipping: Clipping = "flat") -> Engine:
    """The engine of this name on ``network``, whose trainable parameters are set; none is needed for no bound."""
    return (Unclipped if math.isinf(bound) else ENGINES[name])(network, bound, clipping)


def _keep_apart(network: nn.Module) -> None:
    """Make sure that no example changes what is computed of another. Raises :class:`BouquetError` if it would."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise BouquetError(
                "batch normalisation mixes examples",
                where=name,
                expected="a model in which every example is computed by itself",
                got=type(module).__name__,
                cure="Choose a model with layer normalisation, or privacy.mode = 'none'.",
            )
        if isinstance(module, Linear8bitLt):
            # On a GPU, the columns that LLM.int8 leaves in 16 bit are chosen over the whole batch.
            module.state.threshold = 0.0


def _weighted_sum(gradients: Mapping[Tensor, Tensor], factors: Callable[[Tensor], Tensor]) -> dict[Tensor, Tensor]:
    """The sum over the examples, from gradients of ``N x shape of the parameter``."""
    # pow(2).sum, because torch.norm loses 1e-4 in float32 on large tensors.
    squares = torch.stack([gradient.flatten(1).pow(2).sum(1) for gradient in gradients.values()]).sum(0)
    if not (finite := squares.isfinite()).all():
        for gradient in gradients.values():
            gradient[~finite] = 0  # zero times NaN would be NaN
    weights = factors(squares)
    return {p: torch.mv(gradient.flatten(1).T, weights).view_as(p) for p, gradient in gradients.items()}


def _forward(layer: nn.Linear, record: Callable[[nn.Linear, Tensor, Tensor], None], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return linear(x, layer.weight, layer.bias)
    # The weight is an argument so that the layer has a gradient even where its input needs none.
    output: Tensor = _Linear.apply(x, layer.weight, layer, record)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    """A linear layer whose backward pass records in the place of forming the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, layer: nn.Linear, record: Callable[[nn.Linear, Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        # The layer itself: under gradient checkpointing a saved parameter comes back as another object.
        ctx.layer, ctx.record = layer, record
        return linear(x, weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (g,) = outputs
        ctx.record(ctx.layer, ctx.saved_tensors[0], g)
        return g @ ctx.layer.weight if ctx.needs_input_grad[0] else None, None, None, None
