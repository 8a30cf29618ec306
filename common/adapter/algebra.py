"""The algebra over adapters. Nothing here forms a ``d_out x d_in`` product."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from common.adapter.threads import each
from common.adapter.values import Key, LayerShape, Tensors


def leading(key: Key, tensor: Tensor, rank: int) -> Tensor:
    """The leading ``rank`` slots of a factor; a head as it is."""
    if key.part == "A":
        return tensor[:rank]
    return tensor[:, :rank] if key.part == "B" else tensor


def chosen_blocks(key: Key, tensor: Tensor, blocks: Sequence[int]) -> Tensor:
    """Some blocks of a core, one above the other; all of them if none is named. Any other tensor as it is."""
    if key.part != "R" or not blocks:
        return tensor
    return tensor.reshape(-1, tensor.shape[1], tensor.shape[1])[list(blocks)].flatten(0, 1)


def weighted_mean(updates: Iterable[tuple[float, Tensors]]) -> Tensors:
    """The weighted mean of each tensor over the updates that have it, as a running mean.

    Needs the memory of one update however many come. A single update, and equal updates, come back to the bit.
    """
    mean: Tensors = {}
    total: dict[Key, float] = {}
    for weight, tensors in updates:
        for key, tensor in tensors.items():
            total[key] = total.get(key, 0.0) + weight
            if key in mean:
                mean[key] = moved(mean[key], tensor, weight / total[key])
            else:
                mean[key] = tensor.clone()
    return mean


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The plain mean of tensors of one shape, as :func:`weighted_mean` takes it."""
    key = Key("", "")
    return weighted_mean((1.0, {key: tensor}) for tensor in tensors)[key]


def towards(start: Tensor, end: Tensor, share: float | Tensor) -> Tensor:
    """``start + share (end - start)``; just ``end`` at a share of 1.

    ``torch.lerp``, in additions and multiplications that every CPU rounds alike.
    """
    step, rest = end - start, 1 - share
    if isinstance(share, float):
        return start + step * share if share < 0.5 else end - step * rest
    return torch.where(share < 0.5, start + step * share, end - step * rest)


def moved(start: Tensor, end: Tensor, share: float) -> Tensor:
    """:func:`towards`, to the bit, in the memory of ``start`` where it can be."""
    return start.add_(end.sub(start).mul_(share)) if share < 0.5 else towards(start, end, share)


def squared_norm(left: Tensor, right: Tensor) -> Tensor:
    """The squared Frobenius norm of ``left @ right``, in float64: ``sum((L^T L) * (R R^T))``."""
    left, right = left.double(), right.double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0)


def low_rank_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact thin SVD ``U, S, Vh`` of ``left @ right`` (``d_out x q``, ``q x d_in``), from two QRs and a core."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, singular, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, singular, vh @ q_right.T


def balanced(u: Tensor, singular: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading directions of an SVD as two factors of the same size."""
    root = singular[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def directions_holding(energy: float, singular: Tensor) -> int:
    """The fewest leading singular values whose squares hold a share ``energy`` of all squares; at least 1."""
    share = singular.square().cumsum(0) / singular.square().sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return min(int((share < energy).sum()) + 1, len(singular))


def numerical_rank(singular: Tensor, shape: LayerShape) -> int:
    """How many singular values of a float64 decomposition are more than its rounding."""
    return int((singular > singular[0] * max(shape) * torch.finfo(torch.float64).eps).sum())


def recompress(left: Tensor, right: Tensor, energy: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same product ``left @ right`` in as few columns as its numerical rank; in fewer if ``energy`` allows."""
    u, singular, vh = low_rank_svd(left.double(), right.double())
    rank = max(1, numerical_rank(singular, LayerShape(left.shape[0], right.shape[1])))
    if energy < 1:
        rank = min(rank, directions_holding(energy, singular))
    left_factor, right_factor = balanced(u, singular, vh, rank)
    return left_factor.to(left.dtype), right_factor.to(right.dtype)


def break_even_rank(d_out: int, d_in: int) -> int:
    """The rank above which two factors hold more values than their ``d_out x d_in`` product."""
    return d_out * d_in // (d_out + d_in)


def multiplied(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product ``left @ right`` as one dense factor, and an identity on the smaller side.

    An identity is nearly free to send, as zeros do not travel, so that this costs what the product does. Factors that
    begin with such a pair, as those that are extended again do, have it added and not multiplied.
    """
    (d_out, _), (_, d_in) = left.shape, right.shape
    small = min(d_out, d_in)
    dense = torch.zeros(d_out, d_in, dtype=torch.float64)
    if left.shape[1] >= small and torch.equal((left[:, :small] if d_out < d_in else right[:small]), torch.eye(small)):
        dense += right[:small] if d_out < d_in else left[:, :small]
        left, right = left[:, small:], right[small:]
    dense = (dense + left.double() @ right.double()).float()
    return (torch.eye(small), dense) if d_out < d_in else (dense, torch.eye(small))


def extend_offset(offset: Tensors, extra: Tensors, energy: float = 1.0) -> Tensors:
    """Add two offsets: factors side by side, or past the break-even rank their product.

    With ``energy`` below 1 the factors are recompressed there instead, to that share of the squared singular values;
    what is past the break-even rank even so is multiplied out.
    """

    def extended(layer: str) -> tuple[Tensor, Tensor]:
        q, p = Key(layer, "Q"), Key(layer, "P")
        left, right = extra[q], extra[p]
        if q in offset:
            left, right = torch.cat([offset[q], left], dim=1), torch.cat([offset[p], right], dim=0)
        most = break_even_rank(left.shape[0], right.shape[1])
        if left.shape[1] > most and energy < 1:
            left, right = recompress(left, right, energy)
        if left.shape[1] > most:
            left, right = multiplied(left, right)
        return left, right

    layers = list(dict.fromkeys(key.layer for key in extra))
    total = dict(offset)
    for layer, (left, right) in zip(layers, each(layers, extended), strict=True):
        total[Key(layer, "Q")], total[Key(layer, "P")] = left, right
    return total


def digest(tensors: Mapping[Key, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        sha.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()
