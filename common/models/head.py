"""What stands between a base model and its classes: the layers that are trained in full, sent, and exported.

A checkpoint that was saved as another kind of model lacks some of what a classifier needs, and Transformers draws that
anew in every process: two nodes would train on two models. So whatever the architecture that a checkpoint was saved as
does not have belongs to the head, and the head comes from the coordinator.
"""

from collections.abc import Collection

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from common.models.pooling import Pooled


def find(network: nn.Module) -> list[str]:
    """The head's modules by their full names, in the model's order; none where there is no head.

    These are the layers of which the checkpoint's own architecture lacks a weight, and the last layer of all.
    """
    if isinstance(network, Pooled):
        return ["classifier"] if network.classifier else []
    if not type(network).__name__.endswith("ForSequenceClassification"):
        return []
    encoder = network.base_model_prefix
    children = [
        name for name, child in network.named_children() if name != encoder and any(True for _ in child.parameters())
    ]
    output = children[-1]
    fresh = {_module(name) for name in _lacking(network)}  # type: ignore[arg-type]
    weighted = [name for name, module in network.named_modules() if any(True for _ in module.parameters(False))]
    # PEFT takes a layer for the head's if its name only ends like one: pre_classifier for a classifier.
    alike = {name for name in weighted if "." not in name and name.endswith(output)}
    return [name for name in weighted if name in fresh | alike or inside(name, [output])]


def inside(name: str, modules: Collection[str]) -> bool:
    """Whether a module or parameter of this full name is one of ``modules`` or lies within one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _lacking(network: PreTrainedModel) -> list[str]:
    """The parameters of ``network`` that the architecture its checkpoint was saved as has not, or not of that shape."""
    config = network.config
    saved_as = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if saved_as is None:
        return []
    with torch.device("meta"):
        saved, wanted = saved_as(config), type(network)(config)
    prefix = network.base_model_prefix
    there = {name: parameter.shape for name, parameter in saved.named_parameters()}
    there |= {f"{prefix}.{name}": shape for name, shape in there.items()}
    lacking = [name for name, parameter in wanted.named_parameters() if there.get(name) != parameter.shape]
    # Of an architecture that shares nothing with this one, nothing can be said; the weights themselves will show.
    return lacking if len(lacking) < len(list(wanted.parameters())) / 2 else []


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
