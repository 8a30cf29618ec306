"""Fed-SB: a small core, trained and averaged, between two frames that never change.

Singhal, Ponkshe, Vepakomma, *Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning*, arXiv:2502.15436, on LoRA-SB, arXiv:2411.19557.

    W_0 + B R A          B^T B = I,  A A^T = I,  R is r x r          R <- sum_k p_k R_k

Exact, at a cost of r^2 values a layer however many nodes there are. With orthonormal frames the step of R is the
projection of the full gradient, so there is no alpha to tune: the scale is 1.

Frames that come from a gradient take ``init.name = "lora-sb"``, and a public file. Without one the nodes may find them
(``start`` = nodes), by a sketch of their own gradients in two rounds: B is trained over a random A and gives its basis
Q, then A is trained under Q, and

    U S Vh = svd(A)        B = Q U,  R = S,  A = Vh

The two rounds of ``nodes`` are rounds like any other: averaged, clipped and noised in a private run, and charged. What
the first has learned is given up for its basis, so it alone is not exact. Frames that are not drawn are sent to each
node once. A node's own singular vectors would not do: frames of different nodes do not fit each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from common.adapter.values import Key, State, Update
from common.method import option
from strategies.rules.core import CoreRule
from strategies.rules.rule import Plan

CORE_ONLY = frozenset({"R"})


@dataclass(frozen=True, kw_only=True)
class FedSB(CoreRule):
    """Trains, sends and averages R; A and B are the same on every side from the start."""

    start: str = option("init", among=("init", "nodes"))
    """Where the frames come from: the run's init, or a sketch of the nodes' own gradients in the first two rounds."""

    name = "fed-sb"
    paper = "arXiv:2502.15436"

    @property
    def settled(self) -> int:
        """The nodes find the frames in two rounds."""
        return 2 if self.start == "nodes" else 0

    @property
    def exact(self) -> bool:
        """Not while the nodes find the frames."""
        return super().exact and self.start != "nodes"

    def plan(self, round: int) -> Plan:
        """R in every round, but where the nodes find the frames: B in the first and A in the second."""
        turn = frozenset({"BA"[round]}) if round < self.settled else CORE_ONLY
        return Plan(trained=turn, sent=turn)

    def begin(self, state: State) -> State:
        """Where the nodes find the frames, B of zeros and a core of ones."""
        if self.start != "nodes":
            return state
        adapter = dict(state.adapter)
        for layer in state.layers():
            adapter[Key(layer, "B")] = torch.zeros_like(adapter[Key(layer, "B")])
            adapter[Key(layer, "R")] = torch.eye(state.rank)
        return replace(state, adapter=adapter)

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """The mean; and from it the frames, where the nodes find them."""
        merged = super().merge(state, updates)
        if state.round >= self.settled:
            return merged
        adapter = dict(merged.adapter)
        for layer in state.layers():
            a, b, core = (Key(layer, part) for part in ("A", "B", "R"))
            if state.round == 0:
                basis = torch.linalg.qr(adapter[b])[0]
                adapter[b] = pad(basis, (0, state.rank - basis.shape[1]))
                adapter[a] = torch.zeros_like(adapter[a])
            else:
                u, singular, vh = torch.linalg.svd(adapter[a], full_matrices=False)
                found = len(singular)
                adapter[b] = adapter[b] @ pad(u, (0, state.rank - found))
                adapter[a] = pad(vh, (0, 0, 0, state.rank - found))
                adapter[core] = torch.diag(pad(singular, (0, state.rank - found)))
        return replace(merged, adapter=adapter)
