"""Fed-PLoRA: parallel rank-1 slots, of which each node trains as many as it can.

*Fed-PLoRA*, arXiv:2602.16936 (ICLR 2026).

    a node of rank r_k draws r_k of the R slots in every round and trains them; the others stay in its forward pass
    slot j <- the weighted mean over the nodes that trained it; a slot that nobody trained stays as it is

Every node computes with the whole model, so nothing is lost on the way down, whatever its rank: the slots that it does
not train travel as a frozen offset. The paper folds them into the base weight, which a 4-bit base would round away.
Nodes of full rank make it FedIT. Not exact, for FedIT's reason.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from common.adapter.algebra import towards, weighted_mean
from common.adapter.values import HEAD, Key, State, Tensors, Update
from strategies.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class FedPLora(Rule):
    """Trains and sends a draw of the slots of A and B; the server averages each slot over those who trained it."""

    name = "fed-plora"
    paper = "arXiv:2602.16936"
    # Each slot has its own nodes, and its own sum of weights.
    mixed_ranks = True
    scattered = True
    gets_all = True
    # By what a node's view puts beside it.
    moves_offset = True

    def view(self, state: State, rank: int, draw: int = 0) -> State:
        """The drawn slots to train, and the others beside the offset."""
        self.check_rank(rank, state.rank)
        if rank == state.rank:
            return state
        slots = sorted(random.Random(draw).sample(range(state.rank), rank))
        others = sorted(set(range(state.rank)) - set(slots))
        adapter, offset = dict(state.adapter), dict(state.offset)
        for layer in state.layers():
            a, b = state.adapter[Key(layer, "A")], state.adapter[Key(layer, "B")]
            adapter[Key(layer, "A")], adapter[Key(layer, "B")] = a[slots], b[:, slots]
            for part, side, dim in (("P", a[others], 0), ("Q", state.scale * b[:, others], 1)):
                key = Key(layer, part)
                offset[key] = torch.cat([offset[key], side], dim=dim) if key in offset else side
        return replace(state, adapter=adapter, offset=offset, slots=tuple(slots))

    def model(self, state: State, update: Update) -> State:
        """The node's slots in place, the others as they were."""
        slots = list(update.slots or range(state.rank))
        adapter = {**state.adapter, **{key: t for key, t in update.tensors.items() if key.part in HEAD}}
        for layer in state.layers():
            a, b = Key(layer, "A"), Key(layer, "B")
            adapter[a], adapter[b] = adapter[a].clone(), adapter[b].clone()
            adapter[a][slots], adapter[b][:, slots] = update.tensors[a], update.tensors[b]
        return replace(state, adapter=adapter)

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """The mean of every slot over the nodes that trained it, one update at a time."""
        adapter = {key: tensor.clone() for key, tensor in state.adapter.items()}
        total = torch.zeros(state.rank)
        heads: list[tuple[float, Tensors]] = []
        for update in updates:
            heads.append((update.weight, {key: t for key, t in update.tensors.items() if key.part in HEAD}))
            slots = list(update.slots or range(state.rank))
            total[slots] += update.weight
            # 1 for the first node of a slot, so that nothing of the old value remains.
            share = update.weight / total[slots]
            for layer in state.layers():
                a, b = Key(layer, "A"), Key(layer, "B")
                adapter[a][slots] = towards(adapter[a][slots], update.tensors[a], share[:, None])
                adapter[b][:, slots] = towards(adapter[b][:, slots], update.tensors[b], share)
        return replace(state, adapter={**adapter, **weighted_mean(heads)})
