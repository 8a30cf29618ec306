"""Per-example gradients by Opacus's hooks: Yousefpour et al., *Opacus*, arXiv:2109.12298."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.error import BouquetError
from strategies.gradients.engine import Engine, Rows, folded
from strategies.gradients.gradient import Gradient


class OpacusHooks(Engine):
    """Opacus's hooks: per-example gradients beside the ordinary ones, which are thrown away."""

    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        if any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules()):
            raise BouquetError(
                "Opacus's hooks do not work with gradient checkpointing",
                where="gradient.name",
                expected="'fast', or model.gradient-checkpointing = false",
            )
        self._hooks: Any = _attached(self.network)

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
        self._hooks = _attached(self.network)

    def _sum(self, losses: Tensor, units: Tensor | None, rows: Rows | None) -> Mapping[Tensor, Tensor]:
        self.network.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # The first layers' inputs are embeddings, which need no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(losses.sum())
        samples = {p: getattr(p, "grad_sample", None) for p in self.parameters.values()}
        gradients = {parameter: sample.float() for parameter, sample in samples.items() if sample is not None}
        self._hooks.set_grad_sample_to_none()
        self._check(gradients)
        count = len(losses if units is None else units)
        for gradient in gradients.values():
            if len(gradient) != count:
                raise folded(f"gradients of {count} examples", gradient)
        return self._clipped(gradients, units)


@dataclass(frozen=True, kw_only=True)
class Hooks(Gradient):
    """Opacus's engine, for every kind of layer that it knows."""

    name = "hooks"
    paper = "arXiv:2109.12298"
    engine = OpacusHooks
    packs = False
    rests = False


def _attached(network: nn.Module) -> Any:
    from opacus.grad_sample import GradSampleHooks  # takes seconds to import

    return GradSampleHooks(network, loss_reduction="sum")
