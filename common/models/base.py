"""The frozen base model: found, quantised and loaded."""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from common.config.run import ModelConfig
from common.error import BouquetError
from common.models import embedded, head, placement, prequantised, support, vocabulary, weights
from common.models.pooling import Pooled
from common.sources.images import pillow

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""The files that say how a model is shown images."""


def location(name: str) -> str:
    """Where Transformers finds the model: the embedded one's folder, a local folder, or the hub id itself."""
    if name == "embedded":
        return str(embedded.unpack())
    path = Path(name).expanduser()
    if path.is_dir() and not path.is_absolute() and not name.startswith("."):
        raise BouquetError(
            "the model cannot be loaded",
            where="model.name",
            got=f"'{name}', a hub id that is also a folder here",
            cure="Name the folder by its absolute path.",
        )
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise BouquetError(
            "there is no such model folder",
            where="model.name",
            got=name,
            cure="Use 'embedded', an absolute path to a Transformers folder, or a hub id.",
        )
    return name


def _check_folder(path: Path) -> None:
    """Raise :class:`BouquetError` for an adapter where a base is asked for: Transformers would load both."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise BouquetError(
            "an adapter is not a base model",
            where="model.name",
            expected="a Transformers folder, with config.json",
            got=f"{path}, a PEFT adapter",
            cure="Name its base model, given in adapter_config.json, and start from it with model.adapter.",
        )


def bare(model: ModelConfig, classes: int | None) -> bool:
    """Whether the model is Transformers' without a head, and what becomes of its hidden states is ours."""
    return model.pooled or classes is None


def skeleton(model: ModelConfig, classes: int | None) -> nn.Module:
    """The model on the meta device: shapes without weights.

    ``classes`` = 0 means a causal language model, None one that gives a text's vector.
    """
    config = _config(model, classes)
    auto = _auto(model, config, classes)
    try:
        with torch.device("meta"):
            empty = auto.from_config(config)
    except Exception as error:  # a boundary: whatever Transformers raises, the model is what it cannot make
        raise _unusable(model, error) from error
    support.check_architecture(empty, model.name)
    with torch.device("meta"):
        finished: nn.Module = _finished(empty, model, classes)
        return finished


def load(model: ModelConfig, classes: int | None, device: torch.device, *others: torch.device) -> nn.Module:
    """The model with its weights, quantised as the config says; ``classes`` as for :func:`skeleton`.

    Its blocks are split over ``device`` and the ``others``, if some are named.

    Raises :class:`BouquetError` where the checkpoint lacks a weight that is not the head's.
    """
    compute = _compute_dtype(model.dtype, device)
    empty = skeleton(model, classes)
    config, heads = _config(model, classes), head.find(empty)
    tokenizer = load_tokenizer(model)
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    prequantised.prepare(config, model.quantization, heads, model.name)
    places = placement.places(empty, device, *others)
    options: dict[str, Any] = {"config": config, "dtype": compute, "device_map": places}
    if model.quantization != "none" and not hasattr(config, "quantization_config"):
        options["quantization_config"] = quantization(model.quantization, compute, heads)
    auto = _auto(model, config, classes)
    network, found = _from_hub(auto, model, output_loading_info=True, ignore_mismatched_sizes=bool(classes), **options)
    weights.check_whole(found, ["pooler"] if bare(model, classes) else heads, location(model.name))
    keep_trainable(network)
    for module in network.modules():
        if isinstance(module, Linear4bit):
            # Whatever the base was saved with.
            module.compute_dtype = compute
    if model.gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    network = _finished(network, model, classes)
    support.check_output(network, classes, model.name)
    if classes == 0:
        network.generation_config.eos_token_id = vocabulary.ends(tokenizer, config, network.generation_config)
    loaded: nn.Module = network
    return loaded


def keep_trainable(network: nn.Module) -> None:
    """Keep bitsandbytes from making 4-bit weights of a network fit for inference alone.

    On CPUs with bfloat16 units, the first evaluation would repack them, for good and with loss, and no gradient would
    pass the layer again.
    """
    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@lru_cache(maxsize=1)
def positions(model: ModelConfig) -> int | None:
    """How many tokens the model takes; None where it knows no bound."""
    with torch.device("meta"):
        return vocabulary.positions(AutoModel.from_config(_from_hub(AutoConfig, model)))


@lru_cache(maxsize=1)
def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which pads with a token that the model knows."""
    tokenizer: PreTrainedTokenizerBase = _from_hub(AutoTokenizer, model)
    config = _from_hub(AutoConfig, model)
    vocabulary.check_template(tokenizer, config, model.name)
    padding = vocabulary.pad_token(tokenizer, config)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


@lru_cache(maxsize=1)
def load_processor(model: ModelConfig) -> Any:
    """What makes tensors of images for the model.

    Raises :class:`BouquetError` for a model that sees none, and where Pillow is not installed.
    """
    pillow()
    config = _from_hub(AutoConfig, model)
    processor: Any = _from_hub(AutoProcessor, model) if support.sees(config) else None
    if not hasattr(processor, "image_processor") or getattr(processor, "image_token_id", None) is None:
        raise BouquetError(
            "the model does not take images",
            where=f"task.name = 'vision', {model.name}, of type '{config.model_type}'",
            expected="a model that Transformers has an AutoModelForImageTextToText and a processor for",
            got="no processor_config.json that names one" if support.sees(config) else "a text-only model",
            cure="Choose a model such as a LLaVA, with its processor's files beside its weights.",
        )
    # One way of two to scale an image, so that a node sees what others see, whatever is installed there.
    processor.image_processor = _from_hub(AutoImageProcessor, model, backend="pil")
    return processor


def check_words(model: ModelConfig, tokens: Iterable[int]) -> None:
    """Raise :class:`BouquetError` where the tokenizer has made a token of a text that the model does not have."""
    vocabulary.check(tokens, load_tokenizer(model), _from_hub(AutoConfig, model), model.name)


@lru_cache(maxsize=1)
def digest(model: ModelConfig) -> str:
    """What tells one base model, with its tokenizer and its processor, from another: 16 hexadecimal digits."""
    folder, words = _folder(model), json.dumps(sorted(load_tokenizer(model).get_vocab().items()))
    seen = f" {weights.settings(folder, PROCESSORS)}" if support.sees(_from_hub(AutoConfig, model)) else ""
    return hashlib.sha256(f"{weights.digest(folder)} {words}{seen}".encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def commit(model: ModelConfig) -> str | None:
    """The commit on the hub that the model is of, whatever moves its branch later; None for a folder."""
    where = location(model.name)
    if Path(where).is_dir():
        return None
    try:
        # <cache>/snapshots/<commit>/config.json
        return Path(hf_hub_download(where, "config.json", revision=model.revision)).parent.name
    except Exception as error:  # a boundary: whatever the hub's client raises, the model is what cannot be opened
        raise _unusable(model, error) from error


def is_here(model: ModelConfig) -> bool:
    """Whether the model's weights are on this machine; a coordinator does well without."""
    try:
        return weights.there(_folder(model, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return False


def _folder(model: ModelConfig, **options: Any) -> Path:
    """Where the files of the model lie: its folder, or its snapshot in the hub's cache."""
    where = location(model.name)
    return Path(where if Path(where).is_dir() else snapshot_download(where, revision=model.revision, **options))


def _auto(model: ModelConfig, config: Any, classes: int | None) -> Any:
    """Transformers' class for the model."""
    if not bare(model, classes):
        if classes:
            return AutoModelForSequenceClassification
        return AutoModelForImageTextToText if support.sees(config) else AutoModelForCausalLM
    if classes == 0:
        raise BouquetError(
            "there is nothing to pool", where="model.pooling", expected="'default'", got="'mean' with a language model"
        )
    return AutoModel


def _finished(network: Any, model: ModelConfig, classes: int | None) -> Any:
    """The model, with what is ours on a bare one."""
    if not bare(model, classes):
        return network
    return Pooled(network, classes, last=not (model.pooled or support.is_encoder(network.config)))


def _config(model: ModelConfig, classes: int | None) -> Any:
    """Transformers' config of the model, for so many classes. Raises :class:`BouquetError` for what cannot be used."""
    config = _from_hub(AutoConfig, model)
    support.check_kind(config, model.name)
    if not bare(model, classes):
        support.check_form(config, bool(classes), model.name)
    if classes:
        config.num_labels = classes
    prequantised.check(config, model.quantization, model.name)
    text = config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    if isinstance(padding, int) and not 0 <= padding < text.vocab_size:
        text.pad_token_id = None
    return config


def quantization(kind: str, compute: torch.dtype, heads: list[str]) -> BitsAndBytesConfig:
    """How Transformers quantises a base, all but its ``heads``: ``nf4`` with double quantisation, or ``int8``."""
    # Naming modules replaces Transformers' own exceptions, which a language model's output layer is one of.
    skipped = heads or None
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
        # Said outright, so that nobody is asked on a terminal whether a checkpoint's own code may run.
        return auto.from_pretrained(where, revision=model.revision, trust_remote_code=False, **options)
    except Exception as error:  # a boundary: whatever Transformers raises, the model is what cannot be loaded
        weights.check_files(where)
        raise _unusable(model, error) from error


def _unusable(model: ModelConfig, error: Exception) -> BouquetError:
    return BouquetError(
        "the model cannot be loaded",
        where="model.name",
        got=f"'{model.name}' ({(str(error) or type(error).__name__).splitlines()[0]})",
        cure="Use 'embedded', an absolute path to a Transformers folder, or a hub id (offline: in the hub cache).",
    )
