"""RAVAN: several small cores a layer, each between its own frozen frames.

Raje et al., *Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning*, arXiv:2506.05568 (NeurIPS 2025).

    W_0 + sum_i s_i B_i H_i A_i          h heads of rank q, h q = r;  H_i = 0 and s_i = 1 at the start of training
    a node trains H_i and s_i and sends s_i H_i          H_i <- sum_k p_k s_ik H_ik,  s_i <- 1

Exact, because s_i is multiplied in before the mean: averaging s and H apart is not. A rank of h q for h q^2 values. The
frames of all heads are orthonormal to each other (the paper's Gram-Schmidt), drawn from the seed on every side. The
heads are stacked: A is h q x d_in, B is d_out x h q, and R holds the H_i one above the other. ``scales`` = 0 keeps s at
one, for trainers that want linear layers only.

A node of a smaller rank n q trains n heads, drawn anew in every round, and computes with all of them; H_i is then the
mean over the nodes that trained it, and stays where nobody did. Exact only while all nodes train all heads.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from common.adapter.core import Core
from common.adapter.structure import Structure
from common.adapter.values import Key, State, Tensors, Update
from common.error import BouquetError
from common.method import option
from strategies.rules.core import CoreRule
from strategies.rules.rule import CHANGE_RANK, Plan


@dataclass(frozen=True, kw_only=True)
class Ravan(CoreRule):
    """Trains the cores and their scales, sends and averages their product; the frames never change."""

    heads: int = option(4, ge=1)
    """The heads of a layer; `lora.rank` must be a multiple."""
    scales: int = option(1, among=(0, 1))
    """1 trains a scale for each head; 0 keeps them at one, for trainers that want linear layers only."""

    name = "ravan"
    paper = "arXiv:2506.05568"
    mixed_ranks = True
    scattered = True
    gets_all = True
    learning_rate = 5e-2

    @property
    def structure(self) -> Structure:
        """One block a head."""
        return Core(blocks=self.heads)

    def plan(self, round: int) -> Plan:
        """R and s are trained, R is sent, in every round."""
        return Plan(trained=frozenset({"R", "s"} if self.scales else {"R"}), sent=frozenset({"R"}))

    def check_rank(self, rank: int, whole: int, where: str = "lora-rank", cure: str = CHANGE_RANK) -> None:
        """A smaller rank must be one of whole heads."""
        super().check_rank(rank, whole, where, cure)
        if rank % (whole // self.heads):
            raise BouquetError(
                "a rank that is not one of whole heads",
                where=where,
                expected=f"a multiple of {whole // self.heads} (lora.rank / rule.ravan.heads)",
                got=str(rank),
                cure=cure,
            )

    def view(self, state: State, rank: int, draw: int = 0) -> State:
        """All heads, of which the drawn ones are to be trained."""
        self.check_rank(rank, state.rank)
        if rank == state.rank:
            return state
        count = rank * self.heads // state.rank
        return replace(state, slots=tuple(sorted(random.Random(draw).sample(range(self.heads), count))))

    def send(self, received: State, local: Tensors) -> Tensors:
        """Every core that was trained, multiplied by its scale."""
        sent = super().send(received, local)
        for layer in received.layers():
            key = Key(layer, "R")
            scaled = sent[key] * local[Key(layer, "s")].repeat_interleave(sent[key].shape[1])[:, None]
            sent[key] = self.structure.chosen(key, scaled, received.slots)
        return sent

    def model(self, state: State, update: Update) -> State:
        """The node's heads in place, the others as they were."""
        by_head = _by_head(update.tensors, update.slots)
        return replace(state, adapter={**state.adapter, **self.joined(state, by_head)})

    def collected(self, state: State, updates: Iterable[Update]) -> Iterator[tuple[float, Tensors]]:
        """Every head by itself, from the nodes that trained it."""
        return ((update.weight, _by_head(update.tensors, update.slots)) for update in updates)

    def _averages_models(self, round: int) -> bool:
        """The scales are multiplied in before the mean."""
        return True

    def _slots(self, state: State, update: Update) -> tuple[int, int]:
        return len(update.slots), self.heads

    def joined(self, state: State, by_head: Tensors) -> Tensors:
        """Whole cores again; a head that is not there is the state's."""
        joined = {key: tensor for key, tensor in by_head.items() if key.part != "R"}
        for layer in state.layers():
            core = state.adapter[Key(layer, "R")].chunk(self.heads)
            heads = [by_head.get(_head_key(layer, number), head) for number, head in enumerate(core)]
            joined[Key(layer, "R")] = torch.cat(heads)
        return joined


def _head_key(layer: str, number: int) -> Key:
    return Key(f"{layer}/{number}", "R")


def _by_head(tensors: Tensors, slots: Sequence[int]) -> Tensors:
    """Each head of a core under a key of its own."""
    parted: Tensors = {}
    for key, tensor in tensors.items():
        if key.part != "R":
            parted[key] = tensor
            continue
        heads = tensor.chunk(len(tensor) // tensor.shape[1])
        numbers = slots or range(len(heads))
        parted |= {_head_key(key.layer, number): head for number, head in zip(numbers, heads, strict=True)}
    return parted
