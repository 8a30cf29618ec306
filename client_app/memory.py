"""What a node keeps for itself between rounds: tensors that are trained but not sent, such as a local head.

On the node's own disk, because Flower's context does not outlive a restart.
"""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from common.adapter import Key, Tensors

# As many rounds as a resumed run can go back: the newest checkpoint, the one before it if that is torn, and one more.
KEPT = 3
DEFAULT_DIRECTORY = Path.home() / ".bouquet" / "state"


class Memory:
    """The personal tensors of one node in one run, in files of mode 0600.

    One file a round: a coordinator that is killed before its checkpoint asks for the round again, and the node must
    start it from what it had then.
    """

    def __init__(self, directory: str, run: str, node: str) -> None:
        self._folder = Path(directory or DEFAULT_DIRECTORY) / run / node

    @property
    def adapter(self) -> Path:
        """The folder of the node's own PEFT adapter, where the rule or the head is personal."""
        return self._folder / "adapter"

    def load(self, round: int) -> Tensors:
        """What was kept before ``round``, whichever later rounds were begun since; nothing before the first."""
        before = [file for file in self._files() if int(file.stem.rpartition("-")[2]) <= round]
        if not before:
            return {}
        return {Key(*name.rsplit(":", 1)): tensor for name, tensor in load_file(before[-1]).items()}

    def save(self, tensors: Tensors, round: int) -> None:
        """Keep ``tensors`` for ``round`` and those after it, in one step and durably."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self._folder / f"personal-{round:04d}.safetensors"
        building = file.with_suffix(".building")
        save_file({str(key): tensor for key, tensor in tensors.items()}, building)
        building.chmod(0o600)
        with building.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(building, file)
        for old in self._files()[:-KEPT]:
            old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("personal-*.safetensors"))
