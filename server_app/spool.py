"""The updates of a round on disk, until they are merged.

They come in any order and are merged in the order of the nodes' names, so that a run is repeatable; on disk, because a
thousand of them do not fit in memory.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.adapter import Key, Update
from common.error import BouquetError


class Spool:
    """A folder that is there while a ``with`` block runs; its updates can be read again and again, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}

    def put(self, node: str, update: Update) -> None:
        """Keep one node's update. Raises :class:`BouquetError` where the disk does not take it."""
        file = self._folder / f"{len(self._files):06d}.safetensors"
        facts = {"weight": update.weight, "scale": update.scale, "slots": update.slots}
        tensors = {str(key): tensor.contiguous() for key, tensor in update.tensors.items()}
        try:
            save_file(tensors, file, metadata={"update": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            raise _unwritable(file, error) from error
        self._files[node] = file

    def drop(self, node: str) -> None:
        """Leave one node's update out."""
        self._files.pop(node).unlink(missing_ok=True)

    @property
    def names(self) -> list[str]:
        """The nodes whose updates are here, in order."""
        return sorted(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Update]:
        """The updates in the order of the nodes' names."""
        for name in self.names:
            file = self._files[name]
            with safe_open(file, framework="pt") as opened:
                facts = json.loads(opened.metadata()["update"])
                tensors = {Key(*name.rsplit(":", 1)): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            yield Update(tensors, facts["weight"], facts["scale"], tuple(facts["slots"]))

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _unwritable(path: Path, error: Exception) -> BouquetError:
    return BouquetError(
        "the updates of a round cannot be kept",
        where=str(path),
        got=str(error),
        cure="Make room on the disk, writable for this user; finished rounds are kept: start again with resume = true.",
    )
