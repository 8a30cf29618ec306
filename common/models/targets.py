"""The layers of a base model that an adapter is attached to."""

from collections.abc import Sequence

import peft
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.error import BouquetError
from common.models import head, parts

ALL = "all-linear"


def find(network: nn.Module, wanted: str, heads: Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt. Raises :class:`BouquetError` where one of those wanted matches none.

    In a model that sees images, the names are those of its language model's layers; what sees is named by a module that
    holds it, such as ``vision_tower``.
    """
    output = output_layer(network)
    linear = [
        name
        for name, module in network.named_modules()
        if _is_linear(module) and module is not output and not head.inside(name, heads)
    ]
    linear = _taken_as_they_are(network, linear)
    language = parts.within(network, parts.language_model(network))
    words = [word.strip() for word in wanted.split(",")]
    missing = [word for word in words if not any(_meant(name, word, language) for name in linear)]
    if missing:
        held = [name for name, _ in network.named_parameters() if name.split(".")[-1] in missing]
        raise BouquetError(
            "the model's experts cannot be adapted" if held else "the model has no such layer",
            where="lora.targets",
            expected=f"'{ALL}' or some of {', '.join(_names(linear, language))}",
            got=", ".join(missing) + (", weights of all experts in one tensor" if held else ""),
        )
    return [name for name in linear if any(_meant(name, word, language) for word in words)]


def _meant(name: str, word: str, language: str) -> bool:
    """Whether a layer is meant: one of the language model's by the end of its name, another by what holds it."""
    if name.startswith(language):
        return word == ALL or f".{name}".endswith(f".{word}")
    return f".{word}." in f".{name.rpartition('.')[0]}." or word == name


def _names(linear: Sequence[str], language: str) -> list[str]:
    """The words that name layers: the last names of the language model's, and the parts that hold the others."""
    beside = {name: name.split(".") for name in linear if not name.startswith(language)}
    depth = language.count(".") - 1
    own = {name.split(".")[-1] for name in linear if name.startswith(language)}
    return [*sorted(own), *sorted({path[min(depth, len(path) - 2)] for path in beside.values() if len(path) > 1})]


def _taken_as_they_are(network: nn.Module, names: list[str]) -> list[str]:
    """The layers that PEFT adapts as they are: of a model whose experts share one tensor it takes some for the experts.

    It does so by their last names alone, and whoever loads an adapter would get the same.
    """
    config = peft.LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(config, network, None)
    return [name for name in names if name in (config.target_modules or ())]


def output_layer(network: nn.Module) -> nn.Module | None:
    """What makes words of the last hidden state; None for what is no language model."""
    found: nn.Module | None = getattr(network, "get_output_embeddings", lambda: None)()
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether PEFT adapts a module as a linear layer; those of GPTQ and AWQ are of no common class."""
    return isinstance(module, nn.Linear | Conv1D) or hasattr(module, "qweight")


def transposed(network: nn.Module) -> bool:
    """Whether the model keeps its weights as GPT-2 does, d_in x d_out."""
    return any(isinstance(module, Conv1D) for module in network.modules())
