"""Which base models can be trained here, and for what: refused in one sentence before anything is trained."""

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
)

from common.error import BouquetError
from common.method import listed
from common.tasks import TASKS

TOKENS = 4
FOR_ENCODERS = listed([name for name, task in TASKS.items() if not task.language])
"""The tasks that an encoder can learn."""


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether each position of a text sees the later ones too."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def check_kind(config: PretrainedConfig, where: str) -> None:
    """Raise :class:`BouquetError` for a model of two parts, of which one is asked and the other answers."""
    if config.is_encoder_decoder:
        raise BouquetError(
            "an encoder-decoder cannot be trained here",
            where=f"{where}, of type '{config.model_type}'",
            expected=f"a decoder, or an encoder for task.name = {FOR_ENCODERS}",
            cure="Choose another model.",
        )


def check_form(config: PretrainedConfig, classes: bool, where: str) -> None:
    """Raise :class:`BouquetError` for a model of which Transformers has no form to classify, or to continue texts."""
    kind = f"{where}, of type '{config.model_type}'"
    if not classes and is_encoder(config):
        raise BouquetError(
            "an encoder cannot learn to continue a text: each of its positions sees the token that it is to predict",
            where=kind,
            expected="a decoder",
            cure=f"Choose a causal language model, or task.name = {FOR_ENCODERS}.",
        )
    able = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if classes else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in able and not (sees(config) and not classes):
        raise BouquetError(
            f"Transformers has no form of this model that {'classifies' if classes else 'continues'} texts",
            where=kind,
            cure="Choose another model" + (", or model.pooling = 'mean'." if classes else "."),
        )


def sees(config: PretrainedConfig) -> bool:
    """Whether a model of this config that continues texts sees images too: it is one model with them and without."""
    kind, words = type(config), MODEL_FOR_CAUSAL_LM_MAPPING
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    return kind not in words or words[kind] is MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]


def check_architecture(network: Any, where: str) -> None:
    """Raise :class:`BouquetError` for a model that keeps a state from token to token.

    Its fused kernels read the weights past the layers, and with them past an adapter.
    """
    if getattr(network, "_is_stateful", False):
        raise BouquetError(
            "a state-space model cannot be trained here",
            where=f"{where}, of type '{network.config.model_type}'",
            expected="a model whose layers pass on nothing but hidden states",
            cure="Choose a transformer.",
        )


@torch.no_grad()
def check_output(network: Any, classes: int | None, where: str) -> None:
    """Raise :class:`BouquetError` if the model cannot compute a made-up text.

    A language model, for which ``classes`` is 0, may not let what it says of a token depend on the tokens after it.
    """
    device = next(network.parameters()).device
    tokens = torch.arange(TOKENS, device=device).unsqueeze(0) % network.config.get_text_config().vocab_size
    other = tokens.clone()
    other[0, -1] = (tokens[0, -1] + 1) % network.config.get_text_config().vocab_size
    try:
        logits = [network(input_ids=each, attention_mask=torch.ones_like(each)).logits for each in (tokens, other)]
    except Exception as error:  # a boundary: whatever the model raises, it cannot be trained
        raise BouquetError(
            "the model, as loaded, cannot process a text",
            where=where,
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            cure="Try another model.quantization or model.dtype, or choose another model.",
        ) from error
    if classes != 0:
        return
    first, second = (each[0, :-1].float() for each in logits)
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
        raise BouquetError(
            "the model sees the tokens that it is to predict",
            where=where,
            expected="logits that depend on earlier tokens alone",
            got=f"a difference of {float((first - second).abs().max()):.2g}",
            cure="Choose a causal language model.",
        )
