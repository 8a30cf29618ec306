"""FedKSeed: nodes descend along directions from a pool of seeds, and send K scalars, whatever the model.

Qin et al., *Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes*, arXiv:2312.06353 (ICML 2024), algorithm 1.

    a node, in a step    s from the pool    g = (L(w + eps z_s) - L(w - eps z_s)) / (2 eps)    c_s <- c_s - rate g
    the server           c <- sum_k p_k c_k        and so  w <- sum_k p_k w_k

The mean of the scalars is the mean of the factors, since these are linear in c; like FedIT's it is not the mean of
the models, since a layer's update is the product of two. Every node draws seeds of its own, so that a round looks along
more directions than a node has steps. The sampling of FedKSeed-Pro, by the size of earlier slopes, is not here.

What walks is the structure's (``seeded``), how the slope is found the gradient's (``zeroth``), and the step is SGD's.
"""

from dataclasses import dataclass, field

from common.adapter.seeded import Seeded
from common.adapter.structure import Structure
from common.method import GIVEN
from strategies.rules.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class FedKSeed(MeanRule):
    """Trains, sends and averages how far the factors have gone along each direction."""

    adapter: Structure = field(default_factory=Seeded, metadata={GIVEN: True})

    name = "fedkseed"
    paper = "arXiv:2312.06353"

    @classmethod
    def suits(cls, structure: Structure) -> bool:
        """A walk along drawn directions."""
        return type(structure) is Seeded
