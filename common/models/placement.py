"""A base that is split over several devices of one process, since it does not fit one.

Its blocks are computed one after the other, so each device has some of them in a row, by the room that it has; what
stands before and behind them is on the first, where batches come in and outputs go out. Accelerate moves what crosses.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from common.error import BouquetError
from common.models.packing import blocks


def rooms(devices: Sequence[torch.device]) -> list[float]:
    """What is free on each device, in one unit: bytes of GPUs; CPUs have as much as each other."""
    if any(device.type != "cuda" for device in devices):
        return [1.0] * len(devices)
    return [float(torch.cuda.mem_get_info(device)[0]) for device in devices]


def split(network: nn.Module, devices: Sequence[torch.device], room: Sequence[float]) -> dict[str, torch.device]:
    """The device of every part of a ``network``, by the part's name: Accelerate's device map.

    Raises :class:`BouquetError` where it has no blocks.
    """
    names = {module: name for name, module in network.named_modules()}
    if not (found := blocks(network)):
        raise BouquetError(
            "a model without blocks cannot be split",
            where="device",
            got=type(network).__name__,
            cure="Give the node one device, or let the run have another model.",
        )
    sizes = [_size(block) for block in found]
    total = _size(network)
    ends = [end / sum(room) * total for end in accumulate(room)]
    placed, before = {}, total - sum(sizes)
    for block, size in zip(found, sizes, strict=True):
        # A block belongs where its middle falls.
        placed[names[block]] = devices[min(bisect_left(ends, before + size / 2), len(ends) - 1)]
        before += size
    return placed | dict.fromkeys(_others(network, set(placed)), devices[0])


def _others(network: nn.Module, placed: set[str], under: str = "") -> list[str]:
    """The outermost parts of a network in which nothing is ``placed``."""
    found = []
    for own, module in network.named_children():
        name = f"{under}{own}"
        if name in placed:
            continue
        inside = any(each.startswith(f"{name}.") for each in placed)
        found += _others(module, placed, f"{name}.") if inside else [name]
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
