"""Whether two ways to compute one thing agree, up to what rounding does to either."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far apart they may lie, in the largest value, by the type that is computed in."""


@torch.no_grad()
def agree(network: nn.Module, both: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether ``both`` ways give the same values, without dropout; not where either raises, or is no number."""
    training = network.training
    network.eval()
    try:
        one, other = both()
    except Exception:  # a boundary: whatever the model raises, one of the ways is closed to it
        return False
    finally:
        network.train(training)
    if one.shape != other.shape:
        return False
    tolerance = TOLERANCES[computing_type(network, TOLERANCES)]
    return float((one.float() - other.float()).abs().max()) <= tolerance * float(other.float().abs().max())


def computing_type(network: nn.Module, known: Collection[torch.dtype]) -> torch.dtype:
    """The coarsest of the ``known`` types that the network's values have: what is not quantised shows it."""
    found = {parameter.dtype for parameter in network.parameters()} & set(known)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)
