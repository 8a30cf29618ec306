"""The PEFT folder that a run leaves: what ``PeftModel.from_pretrained`` loads.

A head over mean pooling is no head of Transformers'. Its folder is an adapter of the bare encoder (``AutoModel``), with
the head's weight and bias beside it in ``head.safetensors``::

    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)
    hidden = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    logits = linear(pool(hidden, mask), head["classifier.weight"], head["classifier.bias"])

with :func:`common.pooling.pool`. ``AutoPeftModelForSequenceClassification`` refuses it.
"""

from pathlib import Path

import peft
from safetensors.torch import save_file

from common import base
from common.adapter import CORE, HEAD, State, Tensors, stacked
from common.config import RunConfig
from common.models import PREFIX
from common.tasks import TASKS

SUFFIX = {"A": "lora_A.weight", "B": "lora_B.weight", "W": "weight", "b": "bias"}


def export(state: State, config: RunConfig, folder: Path, *, with_head: bool) -> None:
    """Write ``state`` as one PEFT adapter. An offset is stacked on the factors exactly; nothing is merged or cut.

    ``with_head`` is false where every node has a head of its own, and the state has none that means anything.
    """
    head: Tensors = {}
    if with_head:
        head = {key: tensor for key, tensor in state.adapter.items() if key.part in HEAD}
    factors = {key: tensor for key, tensor in state.adapter.items() if key.part not in HEAD}
    scale = state.scale
    if state.offset or CORE & {key.part for key in factors}:
        factors, scale = stacked(state), 1.0
    folder.mkdir(parents=True, exist_ok=True)
    if config.model.pooling == "mean":
        if head:
            _save(folder / "head.safetensors", head)
        head = {}
        factors = {key._replace(layer=key.layer.removeprefix("encoder.")): tensor for key, tensor in factors.items()}
    ranks = {key.layer: len(tensor) for key, tensor in factors.items() if key.part == "A"}
    rank = max(ranks.values())
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=rank * scale,  # type: ignore[arg-type]  # PEFT divides it by r, whole or not
        rank_pattern={layer: own for layer, own in ranks.items() if own != rank},
        alpha_pattern={layer: own * scale for layer, own in ranks.items() if own != rank},
        target_modules=list(ranks),
        modules_to_save=sorted({key.layer.split(".")[0] for key in head}) or None,
        task_type=_task_type(config),
        base_model_name_or_path=base.location(config.model.name),
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    _save(folder / "adapter_model.safetensors", factors | head, PREFIX)


def _task_type(config: RunConfig) -> str:
    if config.model.pooling == "mean":
        return "FEATURE_EXTRACTION"
    return "SEQ_CLS" if TASKS[config.task.name].sequence_classification else "CAUSAL_LM"


def _save(file: Path, tensors: Tensors, prefix: str = "") -> None:
    named = {f"{prefix}{key.layer}.{SUFFIX[key.part]}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(named, file, metadata={"format": "pt"})
