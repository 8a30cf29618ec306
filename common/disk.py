"""What is written to a disk: whole, and said in a sentence where the disk does not take it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.error import DiskError

OF_A_RUN = "Make room on the disk, writable for this user; finished rounds are kept: start again with resume = true."
OF_A_NODE = "Make room on this node's disk, writable for this user; it is asked again in the next round."


@contextmanager
def writing(what: str, file: Path, cure: str = OF_A_RUN) -> Iterator[None]:
    """Raise :class:`DiskError` where the disk does not take ``what`` is written here."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise DiskError(f"{what} cannot be written", where=str(file), got=said or str(error), cure=cure) from error


def write_whole(file: Path, text: str) -> None:
    """Replace a file in one step: it is the old one or the new one, whatever ends this process or fills the disk."""
    building = file.with_suffix(".building")
    building.write_text(text, encoding="utf-8")
    os.replace(building, file)
