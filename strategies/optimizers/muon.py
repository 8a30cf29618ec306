"""Muon: steps whose singular values are all alike, for the matrices of the adapter.

Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024); in a federation, *FedMuon*,
arXiv:2510.27403.

    m <- momentum m + (1 - momentum) g        W <- W - rate sqrt(max(1, rows / columns)) orthogonalised(m)

Torch's own Muon steps along matrices, AdamW along heads and diagonals. FedMuon also averages the nodes' momentum and
sends it with the change, at twice the bytes; here it stays with the node, if that keeps it. Directions that are noise
alone are lifted to the size of all others, so that it gains little in a private run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.adapter.structure import Pair
from common.method import option
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.optimizer import Group


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Torch's Muon for what is a matrix, AdamW for the rest."""

    momentum: float = option(0.95, ge=0, lt=1)
    """How much of the momentum is kept from step to step."""

    name = "muon"
    paper = "arXiv:2510.27403"

    def build(self, pairs: Sequence[Pair], adapter: Group, head: Group) -> torch.optim.Optimizer:
        optimizer = super().build(pairs, adapter, head)
        if not (matrices := [parameter for parameter in adapter.parameters if parameter.dim() == 2]):
            return optimizer
        muon = torch.optim.Muon(matrices, adapter.rate, self.weight_decay, self.momentum)

        def before(*_: Any) -> None:
            # One state for both, so that whoever keeps an optimizer's has it whole; one schedule of the rate.
            muon.state, muon.param_groups[0]["lr"] = optimizer.state, optimizer.param_groups[0]["lr"]
            muon.step()  # type: ignore[no-untyped-call]
            for matrix in matrices:
                matrix.grad = None

        optimizer.register_step_pre_hook(before)
        return optimizer
