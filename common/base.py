"""The frozen base model: found, quantised and loaded."""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from common import embedded
from common.config import ModelConfig
from common.error import BouquetError
from common.pooling import MeanPooled

HEADS = ("classifier", "score", "classification_head")


def location(name: str) -> str:
    """Where Transformers finds the model: the embedded one's folder, a local folder, or the hub id itself."""
    if name == "embedded":
        return str(embedded.unpack())
    path = Path(name).expanduser()
    if path.is_dir() and not path.is_absolute() and not name.startswith("."):
        raise BouquetError(
            "the model cannot be loaded",
            where="model.name",
            got=f"'{name}', a hub id that is a folder here too",
            cure="Name the folder by its absolute path.",
        )
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise BouquetError(
            "there is no such model folder",
            where="model.name",
            got=name,
            cure="Use 'embedded', an absolute path to a Transformers folder, or a hub id.",
        )
    return name


def find_device(wanted: str) -> torch.device:
    """The torch device of a node; ``auto`` is the first GPU, or else the CPU."""
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise BouquetError("an unknown device", where="device", expected="auto, cpu or cuda:0", got=wanted) from error


def positions(model: ModelConfig) -> int | None:
    """How many tokens the model has positions for; None where its config does not say."""
    most = getattr(_from_hub(AutoConfig, model).get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def skeleton(model: ModelConfig, classes: int) -> nn.Module:
    """The model on the meta device: shapes without weights. ``classes`` = 0 means a causal language model."""
    auto = _auto(model, classes)
    config = _from_hub(AutoConfig, model)
    if classes:
        config.num_labels = classes
    with torch.device("meta"):
        empty = auto.from_config(config)
        return MeanPooled(empty, classes) if auto is AutoModel else empty


def load(model: ModelConfig, classes: int, device: torch.device) -> nn.Module:
    """The model with its weights, quantised as the config says. ``classes`` = 0 means a causal language model."""
    compute = _compute_dtype(model.dtype, device)
    options: dict[str, Any] = {"dtype": compute, "device_map": {"": device}}
    if model.quantization != "none":
        options["quantization_config"] = _quantization(model.quantization, compute, classes)
    if classes:
        options["num_labels"] = classes
    auto = _auto(model, classes)
    network = _from_hub(auto, model, **options)
    for module in network.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with bfloat16 units, the first evaluation would repack the weights for inference, for good and
            # with loss, and no gradient would pass the layer again.
            module.support_avx512bf16_for_cpu = False
    if model.gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    return MeanPooled(network, classes) if auto is AutoModel else network


@lru_cache(maxsize=1)
def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end token."""
    tokenizer: PreTrainedTokenizerBase = _from_hub(AutoTokenizer, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _auto(model: ModelConfig, classes: int) -> Any:
    """Transformers' class for the model: an encoder alone where the head is ours."""
    if model.pooling == "default":
        return AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    if not classes:
        raise BouquetError(
            "there is nothing to pool", where="model.pooling", expected="'default'", got="'mean' with a language model"
        )
    return AutoModel


def _quantization(kind: str, compute: torch.dtype, classes: int) -> BitsAndBytesConfig:
    # Transformers would quantise a fresh head that has a bias; naming modules replaces its own list of exceptions.
    skipped = list(HEADS) if classes else None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skipped,
    )


def _compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    # On a CPU, bfloat16 costs two to three times float32.
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _from_hub(auto: Any, model: ModelConfig, **options: Any) -> Any:
    where = location(model.name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*were not initialized.*")
            return auto.from_pretrained(where, revision=model.revision, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise BouquetError(
            "the model cannot be loaded",
            where="model.name",
            got=f"'{model.name}' ({str(error).splitlines()[0]})",
            cure="Use 'embedded', an absolute path to a Transformers folder, or a hub id (offline: in the hub cache).",
        ) from error
