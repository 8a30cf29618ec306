"""One worker per GPU, and one message at a time: locks by its own UUID, whatever nodes and runs share the machine.

The locks lie in a folder of the user's that every node of the machine sees: systemd's ``RuntimeDirectory``, the login's
``XDG_RUNTIME_DIR``, or one under ``/tmp``. Containers do not see each other's; their engine gives each its GPU.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from io import TextIOWrapper
from pathlib import Path

import torch

from common.error import BouquetError
from common.models.placement import find_devices


def identity(device: torch.device) -> str:
    """The UUID of a GPU, whatever number it has here; nothing for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def identities(devices: Iterable[str]) -> list[str]:
    """The UUIDs of the GPUs behind a node's devices, in the order in which everybody waits for them."""
    return sorted({identity(each) for device in devices for each in find_devices(device)} - {""})


@cache
def reserve(gpu: str, state: Path) -> TextIOWrapper:
    """Hold a GPU for this process until it ends, however it does. ``state`` says whose it is.

    Raises :class:`BouquetError` where another process holds it.
    """
    lock = (_folder() / f"{gpu}.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with lock:
            lock.seek(0)
            holder = lock.read().strip()
        raise BouquetError(
            "another worker is using this GPU",
            where=gpu,
            got=holder,
            cure="Give each node its own GPU (device, CUDA_VISIBLE_DEVICES), or set warm = 0.0 on all but one.",
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()}, {state}\n")
    lock.flush()
    return lock


@contextmanager
def turn(*gpus: str) -> Iterator[None]:
    """Wait for GPUs that processes of this machine take in turns, a message each; nothing to wait for on a CPU."""
    with ExitStack() as held:
        for gpu in gpus:
            lock = held.enter_context((_folder() / f"{gpu}.turn").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _folder() -> Path:
    """The folder of the locks. Raises :class:`BouquetError` if it is another user's."""
    own = os.environ.get("RUNTIME_DIRECTORY") or os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(own) / "bouquet" if own else Path(tempfile.gettempdir()) / f"bouquet-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise BouquetError("a lock folder that belongs to another user", where=str(folder), cure="Remove it.")
    return folder
