"""What a node keeps for itself between rounds: tensors that are trained but not sent, such as a local head.

On the node's own disk, because Flower's context does not outlive a restart.
"""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from common.adapter import Key, Tensors


class Memory:
    """The personal tensors of one node in one run, in one file of mode 0600."""

    def __init__(self, directory: Path, run: str, node: str) -> None:
        self._folder = directory / run / node
        self._file = self._folder / "personal.safetensors"

    @property
    def adapter(self) -> Path:
        """The folder of the node's own PEFT adapter, where the rule or the head is personal."""
        return self._folder / "adapter"

    def load(self) -> Tensors:
        """What was saved last; nothing before the first round."""
        if not self._file.exists():
            return {}
        return {Key(*name.rsplit(":", 1)): tensor for name, tensor in load_file(self._file).items()}

    def save(self, tensors: Tensors) -> None:
        """Replace what was saved, in one step."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        building = self._file.with_suffix(".building")
        save_file({str(key): tensor for key, tensor in tensors.items()}, building)
        building.chmod(0o600)
        os.replace(building, self._file)
