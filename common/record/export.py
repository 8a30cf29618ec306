"""The PEFT folder that a run leaves: what ``PeftModel.from_pretrained`` loads.

Beside PEFT's two files stands ``bouquet.json``: the round, and those settings of the run that say what the adapter is.
Where the data were does not go in.

A head over mean pooling is no head of Transformers'. Its folder is an adapter of the bare encoder (``AutoModel``), with
the head's weight and bias beside it in ``head.safetensors``::

    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)
    hidden = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    logits = linear(pool(hidden, mask), head["classifier.weight"], head["classifier.bias"])

with :func:`common.models.pooling.pool`. ``AutoPeftModelForSequenceClassification`` refuses it. The folder of an
embedding model is the same without a head.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import tasks
from common.adapter import structures
from common.adapter.structure import LORA
from common.adapter.values import HEAD, Key, State, Tensors
from common.config.run import ModelConfig, RunConfig, TaskConfig
from common.error import BouquetError
from common.models import adapted, base, targets
from common.record.form import FORMS, form_of

ABOUT = "bouquet.json"
# Whoever passes an adapter on need not tell where the data were, or where this site keeps its runs.
UNTOLD = ("data.", "evaluation.", "run-directory", "resume", "model.adapter")


class Exported(NamedTuple):
    """What an adapter folder holds: the adapter as PEFT has it, and the run's settings in Flower's flat form."""

    state: State
    settings: dict[str, Any]


def export(state: State, config: RunConfig, folder: Path, *, with_head: bool) -> None:
    """Write ``state`` as one PEFT adapter. An offset is stacked on the factors exactly; nothing is merged or cut.

    ``with_head`` is false where every node has a head of its own, and the state has none that means anything.
    """
    form = FORMS[structures.of(state.adapter).form]
    state = form.written(state)
    head: Tensors = {}
    if with_head:
        head = {key: tensor for key, tensor in state.adapter.items() if key.part in HEAD}
    factors = {key: tensor for key, tensor in state.adapter.items() if key.part not in HEAD}
    folder.mkdir(parents=True, exist_ok=True)
    if prefix := within(config.model, config.task):
        if head:
            _save(folder / "head.safetensors", head, form.suffixes)
        head = {}
        factors = {key._replace(layer=key.layer.removeprefix(prefix)): tensor for key, tensor in factors.items()}
    commit = base.commit(config.model)
    settings = form.config(
        state,
        target_modules=list(dict.fromkeys(key.layer for key in factors)),
        modules_to_save=_modules(head, factors),
        task_type=_task_type(config),
        base_model_name_or_path=base.location(config.model.name),
        revision=commit,
        fan_in_fan_out=targets.transposed(base.skeleton(config.model, tasks.classes(config.task))),
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    _save(folder / "adapter_model.safetensors", factors | head, form.suffixes, adapted.PREFIX)
    told = {k: v for k, v in config.to_flower().items() if not (k.startswith(UNTOLD) or k.endswith(".source"))}
    told |= {"model.revision": commit} if commit else {}
    (folder / ABOUT).write_text(json.dumps({"round": state.round, "config": told}, indent=2) + "\n")


def read(folder: Path) -> Exported:
    """What :func:`export` wrote. Raises :class:`BouquetError` where the folder is none of ours, or not whole."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        peft = json.loads((folder / "adapter_config.json").read_text())
        form = form_of(peft)
        settings = dict(about["config"])
        model, task = ({"pooling": settings["model.pooling"]}, {"name": settings["task.name"]})
        prefix = within(ModelConfig.model_validate(model), TaskConfig.model_validate(task))
        named = load_file(folder / "adapter_model.safetensors")
        tensors = {
            key_of(prefix + name.removeprefix(adapted.PREFIX), form.suffixes): tensor for name, tensor in named.items()
        }
        adapter, scale = form.read(tensors, peft)
        if (file := folder / "head.safetensors").is_file():
            adapter |= {key_of(name): tensor for name, tensor in load_file(file).items()}
        state = State(adapter, scale, int(about["round"]))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BouquetError(
            "an adapter folder cannot be read",
            where=str(folder),
            expected=f"adapter_config.json, adapter_model.safetensors and {ABOUT}",
            got=f"{type(error).__name__}: {error}",
            cure="Runs and bouquet export write such folders.",
        ) from error
    return Exported(state, settings)


def within(model: ModelConfig, task: TaskConfig) -> str:
    """What a bare model's layers have before their names here, and not in an adapter's file; else empty."""
    return "encoder." if base.bare(model, tasks.classes(task)) else ""


def key_of(name: str, suffixes: Mapping[str, str] = FORMS[LORA].suffixes) -> Key:
    """The key of a tensor in an adapter's file, without PEFT's prefix. Raises ValueError for one that has none."""
    for part, suffix in suffixes.items():
        if name.endswith(f".{suffix}"):
            return Key(name.removesuffix(f".{suffix}"), part)
    raise ValueError(f"unknown tensor {name}")


def _modules(head: Tensors, factors: Tensors) -> list[str] | None:
    """What PEFT is to save whole: a head's modules beside the encoder, and its single layers within."""
    encoder = {key.layer.split(".")[0] for key in factors}
    tops = {key.layer: key.layer.split(".")[0] for key in head}
    return sorted({layer if top in encoder else top for layer, top in tops.items()}) or None


def _task_type(config: RunConfig) -> str:
    if within(config.model, config.task):
        return "FEATURE_EXTRACTION"
    return "SEQ_CLS" if tasks.classes(config.task) else "CAUSAL_LM"


def _save(file: Path, tensors: Tensors, suffixes: Mapping[str, str], prefix: str = "") -> None:
    named = {f"{prefix}{key.layer}.{suffixes[key.part]}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(named, file, metadata={"format": "pt"})
