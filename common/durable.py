"""Durable writes: whole or not at all, and one clear error where the disk fails."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from common.error import DiskError

OF_A_RUN = "Make room on the disk, writable for this user; finished rounds are kept: start again with resume = true."
OF_A_NODE = "Make room on this node's disk, writable for this user; it is asked again in the next round."
PUBLIC, PRIVATE = 0o666, 0o600
"""Modes of files: what the umask leaves, and this user's alone."""


@contextmanager
def writing(what: str, file: Path, cure: str = OF_A_RUN) -> Iterator[None]:
    """Raise :class:`DiskError` where the disk does not take ``what`` is written here."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise DiskError(f"{what} cannot be written", where=str(file), got=said or str(error), cure=cure) from error


@contextmanager
def replacing(file: Path, mode: int = PUBLIC, *, lasting: bool = True) -> Iterator[Path]:
    """Replace a file in one step: yields an empty file to write, which takes the place of ``file`` afterwards.

    Whatever ends this process or fills the disk, ``file`` is the old one or the new one; once this is left, the new
    one is on the disk, unless it is of no use to anybody after a power cut and need not be ``lasting``. One at a time:
    what a file is built in has one name.
    """
    building = file.with_name(f"{file.name}.building")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if mode == PRIVATE:
        # Nobody else has made it or holds it open, not even for the moment in which it is written.
        building.unlink(missing_ok=True)
        flags |= os.O_EXCL
    os.close(os.open(building, flags, mode))
    try:
        yield building
        if lasting:
            with building.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(building, file)
    except BaseException:
        with suppress(OSError):
            building.unlink()
        raise
    if lasting:
        sync(file.parent)


def write(file: Path, content: str | bytes, mode: int = PUBLIC, *, lasting: bool = True) -> None:
    """Replace a file by ``content``, in one step and for good, as :func:`replacing` does."""
    with replacing(file, mode, lasting=lasting) as building:
        building.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(folder: Path) -> None:
    """Put the names of a folder's files on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
