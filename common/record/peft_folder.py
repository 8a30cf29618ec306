"""A PEFT LoRA adapter, whoever made it, as the start of a run: read from safetensors, or refused by name.

PEFT's update of a layer is ``c B A``, with c = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, where rank and
alpha may differ from layer to layer (``rank_pattern``, ``alpha_pattern``). Here it becomes ``Q P`` with Q = c B, P = A.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.adapter.spec import Spec
from common.adapter.values import FACTORS, HEAD, Key, Tensors, check_values
from common.config.run import ModelConfig, RunConfig
from common.error import BouquetError
from common.models import adapted
from common.record.directory import ADAPTER
from common.record.export import key_of, within

SETTINGS, WEIGHTS, POOLED_HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
# Of PEFT's settings, those that are taken into account below, and those that only say how an adapter was trained.
UNDERSTOOD = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights"}
UNDERSTOOD |= {"peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
ELSEWHERE = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
ELSEWHERE |= {"lora_dropout", "fan_in_fan_out", "eva_config", "runtime_config", "qalora_group_size", "megatron_core"}
# Starts that leave the base as it is. PEFT's others change it, and their adapter means nothing without that.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
SHOWN = 3


def given(config: RunConfig, spec: Spec) -> Tensors | None:
    """The adapter that a run starts from: Q and P of its layers, and its head if it has one; float32.

    None where it starts from none. Raises :class:`BouquetError` for what is no LoRA adapter, and for one that holds
    what the run's model does not.
    """
    if not config.model.adapter:
        return None
    folder, prefix = _folder(config.model), within(config.model, config.task)
    settings = _settings(folder)
    named = _named(folder, prefix)
    factors = {key: tensor for key, tensor in named.items() if key.part in FACTORS}
    head = {key: tensor for key, tensor in named.items() if key.part in HEAD}
    layers = list(dict.fromkeys(key.layer for key in factors))
    _check_known(folder, layers, spec.layers, "layers that the run does not adapt", "Name them in lora.targets.")
    others = (str(key) for key in head)
    beside, cure = "tensors beside its factors", "Set task.name to the task that it was trained for, or name another."
    _check_known(folder, others, map(str, spec.head), f"{beside} that the run does not train", cure)
    scales, shapes = {}, dict(spec.head) if head else {}
    for layer in layers:
        rank, scales[layer] = _scale(folder, settings, layer.removeprefix(prefix))
        d_out, d_in = spec.layers[layer]
        shapes |= {Key(layer, "A"): (rank, d_in), Key(layer, "B"): (d_out, rank)}
    _check_fits(folder, named, shapes, str(settings["base_model_name_or_path"]))
    check_values(named, f"the adapter {folder}")
    update = {key: tensor.float() for key, tensor in head.items()}
    for layer, scale in scales.items():
        update[Key(layer, "Q")] = scale * factors[Key(layer, "B")].float()
        update[Key(layer, "P")] = factors[Key(layer, "A")].float()
    return update


def _folder(model: ModelConfig) -> Path:
    """Where the adapter's files lie: its folder, or its snapshot in the hub's cache."""
    name, path = model.adapter, Path(model.adapter).expanduser()
    if path.is_absolute():
        if not (path / SETTINGS).is_file():
            within = path / ADAPTER
            raise BouquetError(
                "there is no such adapter",
                where="model.adapter",
                expected=f"a folder with {SETTINGS} and {WEIGHTS}",
                got=name,
                cure=f"A run's own is {within}." if (within / SETTINGS).is_file() else "",
            )
        return path
    if path.is_dir() or name.startswith("."):
        raise BouquetError(
            "the adapter cannot be found",
            where="model.adapter",
            expected="an absolute path, or a hub id",
            got=name,
            cure="Name the folder by its absolute path.",
        )
    wanted = [SETTINGS, WEIGHTS, POOLED_HEAD, "adapter_model.bin"]
    try:
        return Path(snapshot_download(name, revision=model.adapter_revision, allow_patterns=wanted))
    except Exception as error:  # a boundary: whatever the hub's client raises, the adapter is what cannot be opened
        raise BouquetError(
            "the adapter cannot be opened",
            where="model.adapter, model.adapter-revision",
            got=f"'{name}' at '{model.adapter_revision}' ({(str(error) or type(error).__name__).splitlines()[0]})",
            cure="Name an absolute path, or a hub id (offline: in the hub cache).",
        ) from error


def _settings(folder: Path) -> Mapping[str, Any]:
    """PEFT's settings. Raises :class:`BouquetError` where one of them makes the adapter more than a LoRA."""
    try:
        told: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        kind, start = told["peft_type"], told.get("init_lora_weights", True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder / SETTINGS, error) from error
    if kind != "LORA":
        raise BouquetError(
            "the adapter is not a LoRA", where=f"{folder / SETTINGS}, peft_type", expected="LORA", got=str(kind)
        )
    plain: dict[str, Any] = peft.LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for key in sorted(told.keys() - UNDERSTOOD - ELSEWHERE):
        if told[key] and told[key] != plain.get(key):
            raise BouquetError(
                "the adapter is more than a LoRA",
                where=f"{folder / SETTINGS}, {key}",
                expected="an adapter with only A and B",
                got=str(told[key])[:80],
                cure="Merge it into its base with PEFT's merge_and_unload, and name that as model.name.",
            )
    if start not in STARTS:
        raise BouquetError(
            "the adapter belongs to a base that its initialisation changed",
            where=f"{folder / SETTINGS}, init_lora_weights",
            expected="an adapter of the unchanged base",
            got=str(start),
            cure="Save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    return plain | told


def _named(folder: Path, prefix: str) -> Tensors:
    """The adapter's tensors under the model's own names. Raises :class:`BouquetError` for any other than factors."""
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise BouquetError(
            "the adapter has no weights that can be read",
            where=str(folder),
            expected=WEIGHTS,
            got="adapter_model.bin, a pickle, which may run code" if pickled else "none",
            cure="If you trust it, load it with PEFT and save it again." if pickled else "",
        )
    named, unknown = Tensors(), []
    try:
        for name, tensor in load_file(folder / WEIGHTS).items():
            try:
                named[key_of(prefix + name.removeprefix(adapted.PREFIX))] = tensor
            except ValueError:
                unknown.append(name)
        if (file := folder / POOLED_HEAD).is_file():
            named |= {key_of(name): tensor for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    _check_known(folder, unknown, (), "tensors that are not factors of a LoRA", "")
    return named


def _check_known(folder: Path, got: Iterable[str], known: Iterable[str], what: str, cure: str = "") -> None:
    if unknown := sorted(set(got) - set(known)):
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise BouquetError(
            f"the adapter has {what}", where=str(folder), got=f"{', '.join(unknown[:SHOWN])}{more}", cure=cure
        )


def _check_fits(folder: Path, named: Tensors, shapes: Mapping[Key, tuple[int, ...]], base: str) -> None:
    for key, shape in shapes.items():
        got = f"shape {tuple(named[key].shape)}" if key in named else "none"
        if got != f"shape {shape}":
            raise BouquetError(
                "the adapter does not fit the run's model",
                where=f"{folder}, {key}",
                expected=f"shape {shape}",
                got=got,
                cure=f"Its base is {base}: name that, or an equivalent, as model.name.",
            )


def _scale(folder: Path, settings: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """The rank of a layer, and what its ``B A`` is multiplied by."""
    try:
        rank = int(_of_layer(settings["rank_pattern"], layer, settings["r"]))
        alpha = float(_of_layer(settings["alpha_pattern"], layer, settings["lora_alpha"]))
        return rank, alpha / (rank**0.5 if settings["use_rslora"] else rank)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        raise _unreadable(folder / SETTINGS, error) from error


def _of_layer(pattern: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """A layer's own value, as PEFT finds it: the first key that ends the layer's name, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default


def _unreadable(where: Path, error: Exception) -> BouquetError:
    return BouquetError(
        "the adapter cannot be read",
        where=str(where),
        expected=f"{SETTINGS} and {WEIGHTS}, as PEFT writes them",
        got=f"{type(error).__name__}: {error}",
        cure="Copy or download it again.",
    )
