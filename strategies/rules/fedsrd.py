"""FedSRD: changes thinned by what they do to the model, rebuilt by the server, and put into one factor at a time.

Yan et al., *FedSRD: Sparsify-Reconstruct-Decompose for Communication-Efficient Federated Large Language Models
Fine-Tuning*, arXiv:2510.04601 (WWW 2026). A node's change is dB A + B_k dA, and of a value of dA or dB it is

    I_A[j, :] = |dA[j, :]| |B_k[:, j]|      I_B[:, j] = |dB[:, j]| |A[j]|
    up      of each tensor the share 1 - q of the largest I, scaled to the size (L1) that the whole had
            q = least + min(reach, slope ln kurtosis(I))
    server  D = sum_k p_k (B + dB_k)(A + dA_k) - B A
            B <- B + D A^+  and  A <- A + B^+ D  in turns

Not exact: what of D lies outside the other factor's span is lost. This is the paper's FedSRD-e, whose decomposition is
the nearest that there is; an SVD before it, which FedSRD has, loses more. D is never formed: A + dA_k meets A^+ first.

Three things differ. The published turns begin with A, over a B that is zero, and lose the first round; here B begins.
Directions of a factor below a tenth of its largest are left alone: a thinned B has many that are next to none, and B^+
would blow A up with them.
And what travels down is whole: the published mask drops nine values in ten at random, and makes noise out of them.
Which values are sent follows from a node's data; the noise of ``update-local`` lies on all of them, sent or not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from common.adapter.values import HEAD, Key, State, Tensors, Update
from common.method import option
from strategies.rules.changes import ChangeRule

SMALLEST = 0.1
"""The share of the largest singular value below which a direction of a factor is none."""


@dataclass(frozen=True, kw_only=True)
class FedSRD(ChangeRule):
    """Trains A and B; sends the changes that matter most to their product; the server refits A and B in turns."""

    least: float = option(0.85, ge=0, lt=1)
    """The share of a change's values that is left out, if they all matter alike."""
    reach: float = option(0.11, ge=0, lt=1)
    """How much more is left out, at most, the more unevenly they matter."""
    slope: float = option(0.1, ge=0, le=10)
    """How fast it comes to that, by the logarithm of the kurtosis; 0 leaves out one share of all."""

    name = "fedsrd"
    paper = "arXiv:2510.04601"
    linear = False
    # Of the few values that are left, each is several times as large.
    learning_rate = 2e-3

    @property
    def density(self) -> tuple[float, float]:
        """What is kept at most."""
        return 1 - self.least, 1.0

    def send(self, received: State, local: Tensors) -> Tensors:
        """The changes that matter most, and zero elsewhere; of a head all."""
        change = super().send(received, local)
        for layer in received.layers():
            a, b = Key(layer, "A"), Key(layer, "B")
            change[a] = self._thinned(change[a], change[a].abs() * local[b].norm(dim=0)[:, None])
            change[b] = self._thinned(change[b], change[b].abs() * received.adapter[a].norm(dim=1))
        return change

    def collected(self, state: State, updates: Iterable[Update]) -> Iterator[tuple[float, Tensors]]:
        """Each node's change of the product, as one of the factor whose turn it is."""
        turn = "B" if state.round % 2 == 0 else "A"
        factors = {key: tensor.double() for key, tensor in state.adapter.items() if key.part not in HEAD}
        fixed = [key for key in factors if key.part not in turn]
        inverses = {key.layer: torch.linalg.pinv(factors[key], rtol=SMALLEST) for key in fixed}
        for update in updates:
            tensors = {key: tensor for key, tensor in update.tensors.items() if key.part in HEAD}
            for layer, inverse in inverses.items():
                a, b = Key(layer, "A"), Key(layer, "B")
                da, db = update.tensors[a].double(), update.tensors[b].double()
                moved = factors[a] + da
                if turn == "B":
                    tensors[b] = (db @ (moved @ inverse) + factors[b] @ (da @ inverse)).float()
                else:
                    tensors[a] = ((inverse @ db) @ moved + (inverse @ factors[b]) @ da).float()
            yield update.weight, tensors

    def _thinned(self, change: Tensor, importance: Tensor) -> Tensor:
        """The values of the largest importance, as large together as all were."""
        share = 1 - min(self.least + min(self.reach, self.slope * log(kurtosis(importance))), 1.0)
        kept = max(1, round(share * change.numel()))
        places = importance.reshape(-1).topk(kept, sorted=False).indices
        values = change.reshape(-1)[places]
        if size := values.abs().sum().item():
            values = values * (change.abs().sum().item() / size)
        return torch.zeros_like(change).reshape(-1).index_copy_(0, places, values).reshape(change.shape)


def kurtosis(values: Tensor) -> float:
    """The fourth power's mean over the square of the second's, about the mean; 1 where all are alike."""
    squares = (values.double() - values.double().mean()).square()
    variance = squares.mean().item()
    return squares.square().mean().item() / variance**2 if variance else 1.0
