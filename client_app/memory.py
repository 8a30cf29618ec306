"""What a node keeps for itself between rounds, on its own disk, because Flower's context does not outlive a restart."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from common.adapter import Key, Tensors


class Memory:
    """What one node keeps in one run, in files of mode 0600.

    Three sets of tensors: ``personal`` (trained but not sent), ``frames`` (constant parts that are sent once), and
    ``feedback`` (what a coarse codec has not sent yet); and a rank, where a rule lowers it.
    """

    def __init__(self, directory: Path, run: str, node: str) -> None:
        self._folder = directory / run / node

    @property
    def adapter(self) -> Path:
        """The folder of the node's own PEFT adapter, where the rule or the head is personal."""
        return self._folder / "adapter"

    @property
    def rank(self) -> int:
        """The rank that the node has come down to; 0 where it has not."""
        file = self._folder / "rank"
        return int(file.read_text()) if file.exists() else 0

    @rank.setter
    def rank(self, rank: int) -> None:
        building = self._building("rank")
        building.write_text(str(rank))
        self._replace(building, "rank")

    def load(self, name: str) -> Tensors:
        """What was saved last under a name; nothing before that."""
        file = self._folder / f"{name}.safetensors"
        if not file.exists():
            return {}
        return {Key(*key.rsplit(":", 1)): tensor for key, tensor in load_file(file).items()}

    def save(self, name: str, tensors: Tensors) -> None:
        """Replace what was saved, in one step."""
        building = self._building(name)
        save_file({str(key): tensor.contiguous() for key, tensor in tensors.items()}, building)
        self._replace(building, f"{name}.safetensors")

    def _building(self, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._folder / f"{name}.building"

    def _replace(self, building: Path, name: str) -> None:
        building.chmod(0o600)
        os.replace(building, self._folder / name)
