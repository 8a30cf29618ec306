"""How much of a base model an adapter reaches, and how much of it is quantised."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from common.models import head


@dataclass(frozen=True)
class Coverage:
    """Shares of the base's weights, from 0 to 1: those of adapted layers, and those that are quantised."""

    adapted: float
    quantised: float


def coverage(network: nn.Module, adapted: Collection[str], quantization: str) -> Coverage:
    """The shares in a model whose layers ``adapted`` have a LoRA, from its skeleton.

    What is in no linear layer is neither: embeddings, norms, and experts that share one tensor.
    """
    heads, output = head.find(network), getattr(network, "get_output_embeddings", lambda: None)()
    linear = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and not head.inside(name, heads)
    }
    # Transformers quantises no class that is derived from a linear layer, such as Falcon's.
    plain = [module for module in linear.values() if type(module) in (nn.Linear, Conv1D)]
    own = (parameter.numel() for name, parameter in network.named_parameters() if not head.inside(name, heads))
    whole = sum(own) or 1
    return Coverage(
        adapted=sum(module.weight.numel() for name, module in linear.items() if name in adapted) / whole,
        quantised=sum(module.weight.numel() for module in plain) / whole if quantization != "none" else 0.0,
    )
