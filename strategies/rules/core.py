"""Rules that train a small core between two frozen, orthonormal frames: ``W_0 + B R A``."""

from dataclasses import dataclass, replace

import torch

from common.adapter.draws import orthonormal_rows
from common.adapter.values import FACTORS, Key, Spec, State
from strategies.rules.rule import MeanRule


@dataclass(frozen=True, kw_only=True)
class CoreRule(MeanRule):
    """A mean of cores. The frames are common, so the mean is exact, and orthonormal, so there is no alpha to tune."""

    exact = True
    constant = FACTORS | {"s"}
    learning_rate = 2e-2

    def initial(self, spec: Spec, seed: int) -> State:
        """Orthonormal frames drawn from the seed, and cores of zeros; the scale is 1."""
        start = super().initial(spec, seed)
        generator = torch.Generator().manual_seed(seed)
        adapter = dict(start.adapter)
        for layer, (d_out, d_in) in spec.layers.items():
            adapter[Key(layer, "A")] = orthonormal_rows(spec.rank, d_in, generator)
            adapter[Key(layer, "B")] = orthonormal_rows(spec.rank, d_out, generator).T.contiguous()
        return replace(start, adapter=adapter, scale=1.0)
