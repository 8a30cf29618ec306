"""HetLoRA: nodes of several ranks, filled up with zeros, weighted by the size of what they learned.

Cho et al., *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*, arXiv:2401.06432 (EMNLP
2024).

    down     A_k = A[:r_k],  B_k = B[:, :r_k]
    loss     + decay sum_layers |B_k[:, c:]| |A_k[c:]|,      c = floor(keep r_k)
    prune    r_k <- c, if that sum has fallen during the round
    up       A <- sum_k w_k pad(A_k),  B <- sum_k w_k pad(B_k),      w_k = |B_k A_k| / sum_j |B_j A_j|  of each layer

Slots are positional, so only the last ones are cut. With the published keep = 0.99 the floor cuts one slot at a time
from any rank up to 100. Not exact: the padding dilutes the last slots, and cross terms remain, as in FedIT. The paper
leaves open whether the norm is taken per layer or over the model; per layer is built here. A slot that no node of the
round has is padding alone, zero in both factors: it starts anew, A drawn and B zero, or it would never learn again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.adapter.algebra import leading, squared_norm, towards, weighted_mean
from common.adapter.draws import layer_seed
from common.adapter.values import HEAD, Key, State, Tensors, Update
from common.method import option
from strategies.rules.rule import Rule
from strategies.rules.stack import revived


@dataclass(frozen=True, kw_only=True)
class HetLora(Rule):
    """Trains and sends the leading slots of A and B that a node has; the server pads and averages."""

    decay: float = option(1e-3, ge=0)
    """The weight of the penalty on the last slots in the nodes' loss; 0 for none."""
    keep: float = option(0.99, gt=0, le=1)
    """The share of its slots that a node keeps where it prunes; 1 never prunes."""
    smallest: int = option(1, ge=1)
    """The rank below which no node prunes."""

    name = "hetlora"
    paper = "arXiv:2401.06432"
    mixed_ranks = True

    @property
    def shrinks(self) -> str:
        """Where slots may be cut."""
        return "rule.hetlora.keep = 1.0" if self.keep < 1 else ""

    def penalty(self, factors: Tensors) -> Tensor | None:
        """What makes the last slots worth giving up."""
        return self.decay * self._tail(factors) if self.decay else None

    def next_rank(self, received: State, local: Tensors) -> int:
        """Fewer slots, where the last ones have lost weight in this round."""
        if self._tail(local) < self._tail(received.adapter):
            return self._cut(received.rank)
        return received.rank

    def send(self, received: State, local: Tensors) -> Tensors:
        """The slots that the node goes on with."""
        rank = self.next_rank(received, local)
        return {key: leading(key, tensor, rank) for key, tensor in super().send(received, local).items()}

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """The norm-weighted mean of the padded factors, one update at a time."""
        mean: Tensors = {}
        total = dict.fromkeys(state.layers(), 0.0)
        heads: list[tuple[float, Tensors]] = []
        for update in updates:
            heads.append((update.weight, {key: t for key, t in update.tensors.items() if key.part in HEAD}))
            for layer in total:
                a, b = update.tensors[Key(layer, "A")], update.tensors[Key(layer, "B")]
                missing = state.rank - len(a)
                # Where no node learned anything, all count the same.
                norm = max(squared_norm(b, a).sqrt().item(), torch.finfo(torch.float32).tiny)
                total[layer] += norm
                for part, padded in (("A", pad(a, (0, 0, 0, missing))), ("B", pad(b, (0, missing)))):
                    key = Key(layer, part)
                    mean[key] = towards(mean[key], padded, norm / total[layer]) if key in mean else padded
        for layer in total:
            rows, seed = Key(layer, "A"), layer_seed(state.seed, state.round + 1, layer)
            mean[rows] = revived(mean[Key(layer, "B")], mean[rows], seed)
        return replace(state, adapter={**state.adapter, **mean, **weighted_mean(heads)})

    def _cut(self, rank: int) -> int:
        return min(rank, max(self.smallest, int(self.keep * rank)))

    def _tail(self, factors: Tensors) -> Tensor:
        """The summed size of the slots that pruning would cut."""
        norms = [torch.zeros(())]
        for key, a in factors.items():
            if key.part == "A":
                b, cut = factors[Key(key.layer, "B")], self._cut(len(a))
                norms.append((b[:, cut:].norm() * a[cut:].norm()).cpu())
        return torch.stack(norms).sum()
