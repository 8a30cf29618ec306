"""Fed-SB: a small core, trained and averaged, between two frames that never change.

Singhal, Ponkshe, Vepakomma, *Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning*, arXiv:2502.15436, on LoRA-SB, arXiv:2411.19557.

    W_0 + B R A          B^T B = I,  A A^T = I,  R is r x r          R <- sum_k p_k R_k

Exact, at a cost of r^2 values a layer however many nodes there are. With orthonormal frames the step of R is the
projection of the full gradient, so there is no alpha to tune: the scale is 1.

LoRA-SB starts from the first step of full fine-tuning, U S Vh = svd(-eta sign G): B = U, R = S, A = Vh. The published
code takes G from the nodes' pooled private data, un-noised. Here ``start`` is one of

    drawn    frames drawn at random from the seed on every side, R = 0: costs nothing, private or not
    public   G from a public file that the coordinator names in ``source``
    nodes    a sketch of the nodes' own gradients in two rounds: B is trained over a random A and gives its basis Q,
             then A is trained under Q, and U S Vh = svd(A) gives  B = Q U,  R = S,  A = Vh

The two rounds of ``nodes`` are rounds like any other: averaged, clipped and noised in a private run, and charged. What
the first has learned is given up for its basis, so it alone is not exact. Frames that are not drawn are sent to each
node once. A node's own singular vectors would not do: frames of different nodes do not fit each other.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.adapter.values import FACTORS, Key, Spec, State, Update
from strategies.rules.core import CoreRule
from strategies.rules.rule import Formulas, Plan

CORE_ONLY = frozenset({"R"})


@dataclass(frozen=True, kw_only=True)
class FedSB(CoreRule):
    """Trains, sends and averages R; A and B are the same on every side from the start."""

    start: str = "drawn"
    source: str = ""
    examples: int = 50
    step: float = 1e-4

    name = "fed-sb"
    paper = "arXiv:2502.15436"
    bytes_up = bytes_down = "b*r*r"

    def __post_init__(self) -> None:
        self._demand("start", self.start in ("drawn", "public", "nodes"), "drawn, public or nodes")
        self._demand("source", bool(self.source) == (self.start == "public"), "a file if, and only if, start is public")
        self._demand("examples", self.examples >= 1, "1 or more")
        self._demand("step", self.step > 0, "more than 0")

    @property
    def blocks(self) -> int:
        """One core of the whole rank."""
        return 1

    @property
    def drawn(self) -> frozenset[str]:
        """Frames taken from a gradient cannot be drawn; they are sent once."""
        return super().drawn - (frozenset() if self.start == "drawn" else FACTORS)

    @property
    def settled(self) -> int:
        """The nodes find the frames in two rounds."""
        return 2 if self.start == "nodes" else 0

    @property
    def is_exact(self) -> bool:
        """Not while the nodes find the frames."""
        return super().is_exact and self.start != "nodes"

    @property
    def formulas(self) -> Formulas:
        """Frames that cannot be drawn travel until they have settled, and once more; what is still zero does not."""
        if self.start == "drawn":
            return super().formulas
        if self.start == "public":
            return Formulas(self.bytes_up, "b*r*(r if t else r + f)")
        found = Formulas("d_out if t == 0 else d_in if t == 1 else r", "d_in if t == 0 else d_out if t == 1 else f")
        return Formulas(f"b*r*({found.up})", f"b*r*(r + (({found.down}) if t < 3 else 0))")

    def plan(self, round: int) -> Plan:
        """R in every round, but where the nodes find the frames: B in the first and A in the second."""
        turn = frozenset({"BA"[round]}) if round < self.settled else CORE_ONLY
        return Plan(trained=turn, sent=turn)

    def initial(self, spec: Spec, seed: int) -> State:
        """Orthonormal frames and a core of zeros; where the nodes find the frames, B of zeros and a core of ones."""
        start = super().initial(spec, seed)
        if self.start != "nodes":
            return start
        adapter = dict(start.adapter)
        for layer in spec.layers:
            adapter[Key(layer, "B")] = torch.zeros_like(adapter[Key(layer, "B")])
            adapter[Key(layer, "R")] = torch.eye(spec.rank)
        return replace(start, adapter=adapter)

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

    def from_gradient(self, state: State, gradient: Callable[[str], Tensor]) -> State:
        """LoRA-SB's start: the best rank-r factors of the first step along ``gradient`` (``d_out x d_in``) by layer."""
        adapter = dict(state.adapter)
        for layer in state.layers():
            step = -self.step * gradient(layer).sign()
            rank = min(state.rank, *step.shape)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                u, singular, v = torch.svd_lowrank(step, q=rank, niter=10)
            a, b, core = (torch.zeros_like(adapter[Key(layer, part)]) for part in ("A", "B", "R"))
            a[:rank], b[:, :rank], core[:rank, :rank] = v.T, u, torch.diag(singular)
            adapter[Key(layer, "A")], adapter[Key(layer, "B")], adapter[Key(layer, "R")] = a, b, core
        return replace(state, adapter=adapter)
