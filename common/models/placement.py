"""Where a base is computed: on a device of the machine, or split over several, since it does not fit one.

The blocks of one that is split are computed one after the other, so each device has some of them in a row, by the room
that it has; what stands before and behind them is on the first, where batches come in and outputs go out. Accelerate
moves what crosses.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from common.error import BouquetError
from common.models.packing import blocks
from common.models.pooling import Pooled


def find_device(wanted: str) -> torch.device:
    """The torch device of a node; ``auto`` is the first GPU, or else the CPU."""
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(wanted)
    except RuntimeError as error:
        raise BouquetError("an unknown device", where="device", expected="auto, cpu or cuda:0", got=wanted) from error
    if found.type == "meta":
        raise BouquetError("a device that stores nothing", where="device", expected="auto, cpu or cuda:0", got=wanted)
    return found


def find_devices(wanted: str) -> list[torch.device]:
    """The torch devices over which one model is split, as ``cuda:0+cuda:1`` names them; mostly one."""
    return [find_device(each.strip()) for each in wanted.split("+")]


def places(empty: nn.Module, *devices: torch.device) -> dict[str, torch.device]:
    """The device of every part of a model that is loaded, by the part's name; ``empty`` is its skeleton.

    Raises :class:`BouquetError` for one that cannot be split, where there are several.
    """
    if len(devices) == 1:
        return {"": devices[0]}
    if isinstance(empty, Pooled):
        raise BouquetError(
            "a model with Bouquet's own head cannot be split",
            where="device, model.pooling = 'mean'",
            expected="one device",
            got="+".join(map(str, devices)),
        )
    return split(empty, devices, rooms(devices))


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
            cure="Give the node one device, or choose another model for the run.",
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
