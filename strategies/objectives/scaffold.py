"""SCAFFOLD: each node's gradients are corrected by how far they differ from all nodes' mean.

Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, arXiv:1910.06378 (ICML 2020),
algorithm 1, option II. With c_i a node's control variate, c the mean of all, K steps a round:

    w <- w - rate (g - c_i + c)         after the round     c_i <- c_i - c + (w_received - w) / (K rate)

The paper sends c down and the change of c_i up, twice the bytes. Where all nodes take part and the server takes their
mean, neither has to travel: the nodes' changes have the mean by which the state moves, so that h_i = c_i - c follows
from that and from the node's own w,

    h_i <- h_i + gain (w_received' - w)        gain = 1 / (K rate)        w_received' the next round's

It is kept as v_i, where the node's own changes alone would have led it: h_i = gain (w_received - v_i). The mean of all
h_i stays zero. Under gradient descent that is option II, to rounding. Under AdamW, whose steps are of no gradient's
length, nodes still settle where their gradients add up to zero, whatever the ``gain``. A reply that is lost after its
node has trained leaves the mean of the h_i elsewhere; where only some nodes are asked, a run is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from common.method import option
from strategies.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Scaffold(Objective):
    """Corrects gradients by how far the node's differ from the mean of all nodes'."""

    gain: float = option(0.1, gt=0, le=1e6)
    """How much of a node's distance from the mean joins its correction in a round; 1 / (steps x rate) in the paper."""

    name = "scaffold"
    paper = "arXiv:1910.06378"
    remembers = True
    compares = True

    def first(self, start: Tensor) -> Tensor:
        return start

    def add(self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]) -> None:
        for parameter, start, own in zip(parameters, received, remembered, strict=True):
            if parameter.grad is not None:
                parameter.grad.sub_(start - own, alpha=self.gain)

    def remember(
        self, parameters: Sequence[nn.Parameter], received: Sequence[Tensor], remembered: Sequence[Tensor]
    ) -> list[Tensor]:
        moved = zip(parameters, received, remembered, strict=True)
        return [own + parameter.detach() - start for parameter, start, own in moved]
