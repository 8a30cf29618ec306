"""LoRA-FAIR: averaged factors, with B corrected towards the mean of the products.

Bian et al., *LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement*, arXiv:2411.14961
(ICCV 2025).

    D = sum_k p_k B_k A_k       B' = Bbar + dB       dB = argmin |D - (Bbar + dB) Abar|^2 + ridge |dB|^2

The paper minimises ``1 - cos(D, B' Abar) + ridge |dB|`` instead (``solver`` = cosine). With the Frobenius norm the
problem has the closed form

    dB = (D - Bbar Abar) Abar^T (Abar Abar^T + ridge I)^-1,        D Abar^T = sum_k p_k B_k (A_k Abar^T)

(``solver`` = ridge). The steps and the learning rate of the paper's gradient descent are not published; the cosine is
minimised by L-BFGS from dB = 0 here, over the same small matrices. Not exact: what of D lies outside the row space of
Abar cannot be reached. ``ridge`` keeps B' near Bbar, without which the paper's accuracy falls below FedIT's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.adapter.algebra import squared_norm, weighted_mean
from common.adapter.threads import each
from common.adapter.values import Key, State, Update
from common.method import option
from strategies.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class LoraFair(Rule):
    """Trains and sends A and B; the server averages A and corrects the mean of B."""

    ridge: float = option(0.01, gt=0)
    """The weight of the correction's squared norm, which keeps B near the mean."""
    solver: str = option("ridge", among=("ridge", "cosine"))
    """What the correction minimises: the Frobenius distance in closed form, or the paper's cosine by L-BFGS."""

    name = "lora-fair"
    paper = "arXiv:2411.14961"

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """(Abar, Bbar + dB)."""
        replies = list(updates)
        total = sum(reply.weight for reply in replies)
        adapter = {**state.adapter, **weighted_mean((reply.weight, reply.tensors) for reply in replies)}
        if len(replies) == 1:
            return replace(state, adapter=adapter)

        def corrected(layer: str) -> Tensor:
            a, b = Key(layer, "A"), Key(layer, "B")
            mean_a, mean_b = adapter[a].double(), adapter[b].double()
            gram = mean_a @ mean_a.T
            image = torch.zeros_like(mean_b)
            for reply in replies:
                image += reply.weight / total * reply.tensors[b].double() @ (reply.tensors[a].double() @ mean_a.T)
            if self.solver == "cosine":
                left = torch.cat([reply.tensors[b] for reply in replies], dim=1)
                right = torch.cat([reply.weight / total * reply.tensors[a] for reply in replies])
                norm = squared_norm(left, right).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
                correction = by_cosine(mean_b, gram, image, norm, self.ridge)
            else:
                ridge = self.ridge * torch.eye(len(gram), dtype=gram.dtype)
                correction = torch.linalg.solve(gram + ridge, (image - mean_b @ gram).T).T
            return (mean_b + correction).to(adapter[b].dtype)

        layers = state.layers()
        means_of_b = {Key(layer, "B"): b for layer, b in zip(layers, each(layers, corrected), strict=True)}
        return replace(state, adapter={**adapter, **means_of_b})


def by_cosine(mean_b: Tensor, gram: Tensor, image: Tensor, norm: Tensor, ridge: float) -> Tensor:
    """The dB (``d_out x r``) that minimises ``1 - cos(D, B' Abar) + ridge |dB|``.

    ``gram`` is ``Abar Abar^T``, ``image`` is ``D Abar^T`` and ``norm`` is ``|D|``: ``<D, B' Abar>`` is
    ``sum(image * B')``, and ``|B' Abar|`` the norm of B' under the gram matrix.
    """
    step = torch.zeros_like(mean_b, requires_grad=True)
    optimizer = torch.optim.LBFGS([step], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> Tensor:
        optimizer.zero_grad()
        corrected = mean_b + step
        length = ((corrected @ gram) * corrected).sum().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        value: Tensor = 1 - (image * corrected).sum() / (norm * length) + ridge * step.norm()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    correction: Tensor = step.detach()
    return correction
