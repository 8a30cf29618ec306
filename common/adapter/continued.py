"""An adapter that is there already, as factors to go on from."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.adapter.algebra import balanced, low_rank_svd, numerical_rank
from common.adapter.values import LayerShape


class Continued(NamedTuple):
    """The start of one layer: B (``d_out x r``) and A (``r x d_in``), and what they leave over, Q P; mostly nothing."""

    b: Tensor
    a: Tensor
    q: Tensor
    p: Tensor


def continued(left: Tensor, right: Tensor, fresh: Tensor, scale: float) -> Continued:
    """The update ``left @ right`` of a layer in as many slots as ``fresh`` has: ``scale B A + Q P`` is the same.

    ``fresh`` (``r x d_in``) is A of a new start. Where the update has fewer slots, or slots of zeros as an export may,
    the others start anew, with B zero and A fresh: with both factors zero they would never learn. Of an update of more
    slots the factors get the leading singular directions, and the rest is left over.
    """
    rank, slots = len(fresh), left.shape[1]
    q, p = left[:, slots:], right[slots:]
    if slots > rank:
        u, singular, vh = low_rank_svd(left.double(), right.double())
        found = numerical_rank(singular, LayerShape(len(left), right.shape[1]))
        q, p = (u * singular)[:, rank : max(rank, found)].float(), vh[rank : max(rank, found)].float()
        left, right = (factor.float() for factor in balanced(u, singular, vh, min(rank, found)))
    missing = rank - left.shape[1]
    b, a = pad(left / scale, (0, missing)), pad(right, (0, 0, 0, missing))
    alive = a.any(dim=1) | b.any(dim=0)
    return Continued(b, torch.where(alive[:, None], a, fresh), q, p)
