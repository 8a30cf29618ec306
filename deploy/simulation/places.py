"""How many nodes this machine has room for at once, and which GPUs each of them sees."""

import os
from collections.abc import Mapping, Sequence

import torch

from common.error import BouquetError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def places(cpus: int, gpus: float) -> Sequence[Mapping[str, str]]:
    """For each of the nodes that compute at once, with so many cores and GPUs, what its environment says of GPUs.

    Half a GPU is one that two nodes share. Raises :class:`BouquetError` where not even one node has room.
    """
    cores = len(os.sched_getaffinity(0))
    _check("--cpus", cpus, cores)
    by_cores = cores // cpus
    if not gpus:
        return [{}] * by_cores  # with all GPUs, as in Flower's simulation
    _check("--gpus", gpus, there := torch.cuda.device_count())
    visible = os.environ.get(VISIBLE) or ",".join(map(str, range(there)))
    return [{VISIBLE: seen} for seen in _shares(visible.split(",")[:there], gpus)][:by_cores]


def _shares(visible: Sequence[str], gpus: float) -> list[str]:
    """What each node sees of some GPUs: a share of one, or several whole ones."""
    if gpus < 1:
        return [gpu for gpu in visible for _ in range(int(1 / gpus))]
    whole = int(gpus)
    return [",".join(visible[first : first + whole]) for first in range(0, len(visible) - whole + 1, whole)]


def _check(option: str, wanted: float, there: int) -> None:
    if wanted > there:
        raise BouquetError(
            "more per node than this machine has", where=option, expected=f"at most {there}", got=f"{wanted:g}"
        )
