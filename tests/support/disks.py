"""Disks that are full, or small: what is written to ``/dev/full`` finds no space left."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FULL = Path("/dev/full")


def fill(file: Path) -> None:
    """From here on a file takes nothing, whether it is open or still to be made."""
    with FULL.open("wb") as full:
        for descriptor in Path("/proc/self/fd").iterdir():
            if descriptor.is_symlink() and descriptor.readlink() == file:
                os.dup2(full.fileno(), int(descriptor.name))
                return
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(FULL)


@contextmanager
def of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows above so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount(*arguments: str | Path) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


@contextmanager
def unmounted_at_last(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
