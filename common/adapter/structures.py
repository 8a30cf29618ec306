"""The structures by name, and a state as one plain LoRA whatever its structure."""

import torch

from common.adapter.core import Core
from common.adapter.dora import Dora
from common.adapter.dylora import DyLora
from common.adapter.ia3 import IA3
from common.adapter.loldu import Loldu
from common.adapter.lora import Lora
from common.adapter.nlora import NLora
from common.adapter.randlora import RandLora
from common.adapter.seeded import Seeded
from common.adapter.structure import Structure
from common.adapter.values import HEAD, Key, State, Tensors
from common.adapter.vera import Vera
from common.method import AUTO, Registry

STRUCTURES = Registry[Structure](
    "adapter",
    Lora,
    DyLora,
    Core,
    NLora,
    Loldu,
    Vera,
    RandLora,
    IA3,
    Dora,
    Seeded,
    default=AUTO,
    chooses="Which tensors stand beside a frozen layer; auto is what the rule trains.",
)


def of(adapter: Tensors) -> Structure:
    """The structure of an adapter: the least one that has all of its parts."""
    parts = {key.part for key in adapter} - HEAD
    return next(kind() for kind in sorted(STRUCTURES.values(), key=lambda kind: len(kind.parts)) if parts <= kind.parts)


def stacked(state: State) -> Tensors:
    """Factors A and B of scale 1 with the whole update of every layer: adapter, core and offset in one."""
    structure, factors = of(state.adapter), Tensors()
    for layer in state.layers():
        left, right = structure.factors(state.adapter, layer)
        left = state.scale * left
        if Key(layer, "Q") in state.offset:
            right = torch.cat([right, state.offset[Key(layer, "P")]], dim=0)
            left = torch.cat([left, state.offset[Key(layer, "Q")]], dim=1)
        factors[Key(layer, "A")], factors[Key(layer, "B")] = right, left
    return factors
