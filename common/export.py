"""The PEFT folder that a run leaves: what ``PeftModel.from_pretrained`` loads."""

from pathlib import Path

import peft
from safetensors.torch import save_file

from common import base
from common.adapter import CORE, HEAD, Key, State, Tensors, stacked
from common.config import RunConfig
from common.models import PREFIX
from common.tasks import TASKS


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
    ranks = {key.layer: len(tensor) for key, tensor in factors.items() if key.part == "A"}
    rank = max(ranks.values())
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=rank * scale,  # type: ignore[arg-type]  # PEFT divides it by r, whole or not
        rank_pattern={layer: own for layer, own in ranks.items() if own != rank},
        alpha_pattern={layer: own * scale for layer, own in ranks.items() if own != rank},
        target_modules=list(ranks),
        modules_to_save=sorted({key.layer.split(".")[0] for key in head}) or None,
        task_type="SEQ_CLS" if TASKS[config.task.name].sequence_classification else "CAUSAL_LM",
        base_model_name_or_path=base.location(config.model.name),
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(folder))
    save_file(
        {_peft_name(key): tensor.contiguous() for key, tensor in (factors | head).items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _peft_name(key: Key) -> str:
    suffix = {"A": "lora_A.weight", "B": "lora_B.weight", "W": "weight", "b": "bias"}[key.part]
    return f"{PREFIX}{key.layer}.{suffix}"
