"""The parts of a base model that sees images: the language model within it, and what sees beside that."""

from typing import Any

from torch import nn


def sees(network: Any) -> bool:
    """Whether a model takes images beside its words."""
    return "image" in getattr(network, "input_modalities", ())


def language_model(network: Any) -> nn.Module:
    """What stands between the embedded words and the hidden states that words are made of.

    Of a model of words alone, this is the whole model; the head that makes words of hidden states stands beside it.
    """
    found: nn.Module = network.get_decoder() if sees(network) else network
    return found


def within(network: nn.Module, part: nn.Module) -> str:
    """What the full names of a part's modules begin with: its own name and a dot; nothing of the whole model."""
    name = next(name for name, module in network.named_modules() if module is part)
    return f"{name}." if name else ""
