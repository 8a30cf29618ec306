"""The forms in which PEFT keeps an adapter: what its tensors are called in a file, and what its settings say of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import peft
from peft.tuners.ia3 import IA3Layer
from torch import nn
from torch.nn.functional import pad

from common.adapter import structures
from common.adapter.lora import Lora
from common.adapter.structure import LORA
from common.adapter.structures import stacked
from common.adapter.values import HEAD, State, Tensors
from common.error import BouquetError

HEADS = {"W": "weight", "b": "bias"}


class Form(NamedTuple):
    """One kind of adapter of PEFT's."""

    suffixes: Mapping[str, str]
    """What the tensor of each part, and of a head, is called after its layer."""
    written: Callable[[State], State]
    """The same model by these parts, with PEFT's values."""
    config: Callable[..., peft.PeftConfig]
    """PEFT's settings, of a state so written and of what is common to all forms."""
    read: Callable[[Tensors, Mapping[str, Any]], tuple[Tensors, float]]
    """What was written, and its scale, from the tensors and the settings of a folder."""


def form_of(settings: Mapping[str, Any]) -> Form:
    """The form of PEFT's ``settings``. Raises KeyError for one that is not known."""
    return FORMS["DORA" if settings.get("use_dora") else settings["peft_type"]]


def one_lora(state: State) -> State:
    """The same model as a plain LoRA of one rank: core and offset stacked on the factors.

    A layer of fewer slots gets zeros, because not everybody reads PEFT's ``rank_pattern``: vLLM has one scale for all
    layers, and llama.cpp divides the one alpha by each layer's own rank. Raises :class:`BouquetError` for a structure
    that has another form.
    """
    structure = structures.of(state.adapter)
    if structure.form != LORA:
        raise BouquetError(
            f"no LoRA computes what the structure '{structure.name}' does",
            where="adapter.name",
            cure="PEFT loads the folder that its run leaves; bouquet export --form merged makes a whole model of it.",
        )
    if not state.offset and len(set(state.ranks.values())) == 1 and structure == Lora():
        return state
    factors = stacked(state)
    rank = max(len(tensor) for key, tensor in factors.items() if key.part == "A")
    for key, tensor in factors.items():
        more = rank - tensor.shape[0 if key.part == "A" else 1]
        factors[key] = pad(tensor, (0, 0, 0, more) if key.part == "A" else (0, more))
    head = {key: tensor for key, tensor in state.adapter.items() if key.part in HEAD}
    return replace(state, adapter=factors | head, scale=1.0, offset={}, slots=())


def _lora_config(state: State, **settings: Any) -> peft.PeftConfig:
    # PEFT divides alpha by r, whole or not.
    return peft.LoraConfig(r=state.rank, lora_alpha=state.rank * state.scale, **settings)  # type: ignore[arg-type]


def _lora_read(tensors: Tensors, settings: Mapping[str, Any]) -> tuple[Tensors, float]:
    return tensors, settings["lora_alpha"] / settings["r"]


def _scales(state: State) -> State:
    """``1 + s g``, a column, as PEFT has it."""
    kept = {key: tensor for key, tensor in state.adapter.items() if key.part in HEAD}
    kept |= {key: 1 + state.scale * g[:, None] for key, g in state.adapter.items() if key.part == "g"}
    return replace(state, adapter=kept)


def _ia3_config(state: State, **settings: Any) -> peft.PeftConfig:
    return peft.IA3Config(feedforward_modules=[], **settings)


def _ia3_read(tensors: Tensors, settings: Mapping[str, Any]) -> tuple[Tensors, float]:
    return {key: kept.squeeze(1) - 1 if key.part == "g" else kept for key, kept in tensors.items()}, 1.0


def _magnitudes(state: State) -> State:
    """``n (1 + s g)`` in the place of both."""
    kept = {key: tensor for key, tensor in state.adapter.items() if key.part != "g"}
    for key, g in state.adapter.items():
        if key.part == "g":
            kept[key._replace(part="n")] = state.adapter[key._replace(part="n")] * (1 + state.scale * g)
    return replace(state, adapter=kept)


def answer_as_asked(network: nn.Module) -> None:
    """Have IA3 layers answer in the type of their input: PEFT's, over a quantised base in 16 bits, do in float32."""
    for module in network.modules():
        if isinstance(module, IA3Layer):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


LORA_FACTORS = {"A": "lora_A.weight", "B": "lora_B.weight"}
FORMS: Mapping[str, Form] = {
    LORA: Form(LORA_FACTORS | HEADS, one_lora, _lora_config, _lora_read),
    "DORA": Form(
        LORA_FACTORS | {"n": "lora_magnitude_vector"} | HEADS,
        _magnitudes,
        partial(_lora_config, use_dora=True),
        _lora_read,
    ),
    "IA3": Form({"g": "ia3_l"} | HEADS, _scales, _ia3_config, _ia3_read),
}
"""By the name that a structure says."""
