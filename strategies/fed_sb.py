"""Fed-SB: a small core, trained and averaged, between two frames that never change.

Singhal, Ponkshe, Vepakomma, *Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning*, arXiv:2502.15436, on LoRA-SB, arXiv:2411.19557.

    W_0 + B R A          B^T B = I,  A A^T = I,  R is r x r          R <- sum_k p_k R_k

Exact, at a cost of r^2 values a layer however many nodes there are. With orthonormal frames the step of R is the
projection of the full gradient, so there is no alpha to tune: the scale is 1.

LoRA-SB starts from the first step of full fine-tuning, U S Vh = svd(-eta sign G): B = U, R = S, A = Vh. The published
code takes G from the nodes' pooled private data. Here G is taken from a public file that the coordinator names
(``rule.fed-sb.source``), and the frames are then sent to each node once; or without one, the frames are drawn at
random from the seed on every side and R starts at zero, which costs nothing, private or not. A node's own singular
vectors would not do: frames of different nodes do not fit each other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.adapter import FACTORS, Key, State
from strategies.core import CoreRule
from strategies.rule import Plan

CORE_ONLY = frozenset({"R"})


@dataclass(frozen=True, kw_only=True)
class FedSB(CoreRule):
    """Trains, sends and averages R; A and B are the same on every side from the start."""

    source: str = ""
    examples: int = 50
    step: float = 1e-4

    name = "fed-sb"
    paper = "arXiv:2502.15436"
    bytes_up = bytes_down = "b*r*r"

    def __post_init__(self) -> None:
        self._demand("examples", self.examples >= 1, "1 or more")
        self._demand("step", self.step > 0, "more than 0")

    @property
    def blocks(self) -> int:
        """One core of the whole rank."""
        return 1

    @property
    def drawn(self) -> frozenset[str]:
        """Frames taken from a gradient cannot be drawn; they are sent once."""
        return super().drawn - (FACTORS if self.source else frozenset())

    def plan(self, round: int) -> Plan:
        """R, in every round."""
        return Plan(trained=CORE_ONLY, sent=CORE_ONLY)

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
