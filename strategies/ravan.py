"""RAVAN: several small cores a layer, each between its own frozen frames.

Raje et al., *Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning*, arXiv:2506.05568 (NeurIPS 2025).

    W_0 + sum_i s_i B_i H_i A_i          h heads of rank q, h q = r;  H_i = 0 and s_i = 1 at the start of training
    a node trains H_i and s_i and sends s_i H_i          H_i <- sum_k p_k s_ik H_ik,  s_i <- 1

Exact, because s_i is multiplied in before the mean: averaging s and H apart is not. A rank of h q for h q^2 values. The
frames of all heads are orthonormal to each other (the paper's Gram-Schmidt), drawn from the seed on every side. The
heads are stacked: A is h q x d_in, B is d_out x h q, and R holds the H_i one above the other. ``scales`` = 0 keeps s at
one, for trainers that want linear layers only.
"""

from dataclasses import dataclass

from common.adapter import Key, Spec, State, Tensors
from common.error import BouquetError
from strategies.core import CoreRule
from strategies.rule import Plan


@dataclass(frozen=True, kw_only=True)
class Ravan(CoreRule):
    """Trains the cores and their scales, sends and averages their product; the frames never change."""

    heads: int = 4
    scales: int = 1

    name = "ravan"
    paper = "arXiv:2506.05568"
    bytes_up = bytes_down = "b*r*r/h"

    def __post_init__(self) -> None:
        self._demand("heads", self.heads >= 1, "1 or more")
        self._demand("scales", self.scales in (0, 1), "0 or 1")

    @property
    def blocks(self) -> int:
        """One block a head."""
        return self.heads

    def plan(self, round: int) -> Plan:
        """R and s are trained, R is sent, in every round."""
        return Plan(trained=frozenset({"R", "s"} if self.scales else {"R"}), sent=frozenset({"R"}))

    def initial(self, spec: Spec, seed: int) -> State:
        """Frames that are orthonormal over all heads. Raises :class:`BouquetError` if they do not divide the rank."""
        if spec.rank % self.heads:
            raise BouquetError(
                "the rank is not a multiple of the heads",
                where="lora.rank, rule.ravan.heads",
                expected=f"a multiple of {self.heads}",
                got=str(spec.rank),
            )
        return super().initial(spec, seed)

    def send(self, received: State, local: Tensors) -> Tensors:
        """Every core, multiplied by its scale."""
        sent = super().send(received, local)
        for layer in received.layers():
            key = Key(layer, "R")
            sent[key] = sent[key] * local[Key(layer, "s")].repeat_interleave(sent[key].shape[1])[:, None]
        return sent
