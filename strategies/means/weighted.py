"""The weighted mean of federated averaging: McMahan et al., arXiv:1602.05629."""

from dataclasses import dataclass

from common.adapter.algebra import weighted_mean
from common.adapter.values import State, Tensors
from strategies.means.mean import Mean, Memory, Updates


@dataclass(frozen=True, kw_only=True)
class Weighted(Mean):
    """``sum_k p_k x_k``, folded one update at a time."""

    name = "weighted"
    paper = "arXiv:1602.05629"

    def __call__(self, state: State, updates: Updates) -> tuple[Tensors, Memory]:
        return weighted_mean(updates), {}
