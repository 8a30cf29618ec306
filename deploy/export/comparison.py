"""Whether an export computes what the run's own model computes, on real inputs.

Everything is computed in float32. What counts is how far the logits of the two are apart at most, as a share of what
the adapter itself changes of them: 0 is the same model, 1 is as far off as the base model without the adapter.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from common import tasks
from common.adapter.values import State
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import base, placement
from common.models.adapted import LoraModel
from deploy import adapters
from strategies import Recipe

P = ParamSpec("P")
T = TypeVar("T")
Texts = Sequence[tasks.Batch]
"""Inputs of a model, a batch of one each."""

TOLERANCES = {"peft": 0.001, "cut": 0.5, "fp16": 0.05, "bf16": 0.25}
"""The largest share by form. Rounding every weight of the base to 8 bits of mantissa is most of bf16's."""


@dataclass(frozen=True)
class Comparison:
    """The largest logit difference, and the largest that the adapter itself makes, over some texts."""

    difference: float
    effect: float
    texts: int

    @property
    def share(self) -> float:
        """The difference as a share of the adapter's effect."""
        return self.difference / self.effect

    def __str__(self) -> str:
        noun = "text" if self.texts == 1 else "texts"
        return (
            f"largest logit difference {self.difference:.2g} on {self.texts} {noun}, "
            f"{self.share:.2g} of what the adapter changes ({self.effect:.2g})"
        )


@dataclass(frozen=True)
class Logits:
    """What the run's own model computes of each text, and what its base does."""

    own: list[Tensor]
    base: list[Tensor]

    def compare(self, others: Sequence[Tensor]) -> Comparison:
        """How far ``others`` are from the run's own. Raises :class:`BouquetError` where the adapter changes nothing."""
        effect = _largest(self.own, self.base)
        if not effect > 0:
            raise BouquetError(
                "the adapter changes nothing",
                expected="other logits than the base model's",
                cure="It has not been trained, or not on texts like these.",
            )
        return Comparison(_largest(self.own, others), effect, len(self.own))


def _alone(compute: Callable[P, T]) -> Callable[P, T]:
    """Give the memory of a function's model back when it returns: two models may not fit on a machine."""

    @wraps(compute)
    def computed(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return compute(*arguments, **options)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return computed


@_alone
def own(state: State, config: RunConfig, texts: Texts, device: str) -> Logits:
    """The logits of the run's own model, put together as a node does it: factors, core and offset apart."""
    network = base.load(config.model, tasks.classes(config.task), placement.find_device(device))
    structure = Recipe.build(config).structure
    model = LoraModel(network, config.lora.model_copy(update={"rank": state.rank, "rank_pattern": ""}), structure)
    model.install(state.adapter, state.scale, state.offset)
    network = model.network.eval()
    adapted = _logits(network, texts)
    with network.disable_adapter():
        return Logits(adapted, _logits(network, texts))


@_alone
def reloaded(folder: Path, config: RunConfig, texts: Texts, device: str) -> list[Tensor]:
    """The logits of a PEFT folder, loaded by PEFT."""
    return _logits(adapters.load(folder, config, device), texts)


@_alone
def remerged(config: RunConfig, texts: Texts, device: str) -> list[Tensor]:
    """The logits of a merged model, loaded by Transformers."""
    return _logits(base.load(config.model, tasks.classes(config.task), placement.find_device(device)).eval(), texts)


@torch.no_grad()
def _logits(network: nn.Module, texts: Texts) -> list[Tensor]:
    device = next(network.parameters()).device
    batches = [{name: tensor.to(device) for name, tensor in text.items()} for text in texts]
    return [network(**batch).logits.float().cpu() for batch in batches]


def _largest(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    largest = torch.stack([(a - b).abs().max() for a, b in zip(left, right, strict=True)]).max()
    return float(largest)
