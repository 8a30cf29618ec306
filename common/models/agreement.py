"""Whether two ways to compute one thing agree, up to what rounding does to either."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far apart they may lie, in the largest value, by the type that is computed in."""


def agree(one: Tensor, other: Tensor, network: nn.Module) -> bool:
    """Whether ``network`` may have computed the same values twice; never where one of them is no number."""
    if one.shape != other.shape:
        return False
    tolerance = TOLERANCES[computing_type(network, TOLERANCES)]
    return float((one.float() - other.float()).abs().max()) <= tolerance * float(other.float().abs().max())


def computing_type(network: nn.Module, known: Collection[torch.dtype]) -> torch.dtype:
    """The coarsest of the ``known`` types that the network's values have: what is not quantised shows it."""
    found = {parameter.dtype for parameter in network.parameters()} & set(known)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)
