"""What a node keeps for itself between rounds: on its own disk, since Flower's context does not outlive a restart."""

from contextlib import AbstractContextManager
from pathlib import Path

from safetensors.torch import load_file, save_file

from common import durable, owned
from common.adapter.values import Key, Tensors

# As many rounds as a resumed run can go back: the newest checkpoint, the one before it if that is torn, and one more.
KEPT = 3


class Memory:
    """What one node keeps in one run, in files of mode 0600.

    Sets of tensors: ``personal`` (trained but not sent), ``frames`` (constant parts that are sent once), ``feedback``
    (what a coarse codec has not sent yet), what the objective remembers and the optimizer's state; a rank, where a rule
    lowers it; and a clip, where it follows the gradients. Each set has a file a round: a coordinator that is killed
    before its checkpoint asks for the round again, and the node must start it from what it had then.

    A run of another privacy ``mode`` finds nothing of it, whatever its name: what one may keep, another's noise does
    not cover.
    """

    def __init__(self, directory: Path, run: str, node: str, mode: str = "none") -> None:
        self._node = directory / "runs" / run / node
        self._folder = self._node if mode == "none" else self._node / mode

    @property
    def adapter(self) -> Path:
        """The folder of the node's own PEFT adapter, where the rule or the head is personal."""
        return self._node / "adapter"

    def make(self) -> None:
        """Make the folders, for this user alone; those that are there stay as they are."""
        with self._writing():
            if not self._folder.exists():
                owned.make_folder(self._folder)

    @property
    def rank(self) -> int:
        """The rank that the node has come down to; 0 where it has not."""
        return int(self._number("rank"))

    @rank.setter
    def rank(self, rank: int) -> None:
        self._keep_number("rank", rank)

    @property
    def clip(self) -> float:
        """The clip that the node's last private round ended with; 0 before the first."""
        return self._number("clip")

    @clip.setter
    def clip(self, clip: float) -> None:
        self._keep_number("clip", clip)

    def load(self, name: str, round: int) -> Tensors:
        """What was saved under a name for ``round``, or last before it; nothing before that."""
        before = [file for file in self._files(name) if _round(file) <= round]
        if not before:
            return {}
        return {Key.parse(key): tensor for key, tensor in load_file(before[-1]).items()}

    def save(self, name: str, tensors: Tensors, round: int) -> None:
        """Keep ``tensors`` for ``round`` and those after it, in one step and durably.

        Raises :class:`DiskError`, as whatever is kept here does, where the disk does not take it.
        """
        self.make()
        with (
            self._writing(),
            durable.replacing(self._folder / f"{name}-{round:04d}.safetensors", durable.PRIVATE) as file,
        ):
            save_file({str(key): tensor.contiguous() for key, tensor in tensors.items()}, file)
        for old in self._files(name)[:-KEPT]:
            old.unlink()

    def _number(self, name: str) -> float:
        file = self._folder / name
        return float(file.read_text()) if file.exists() else 0.0

    def _keep_number(self, name: str, number: float) -> None:
        self.make()
        with self._writing():
            durable.write(self._folder / name, repr(number), durable.PRIVATE)

    def _writing(self) -> AbstractContextManager[None]:
        return durable.writing("what this node keeps", self._folder, durable.OF_A_NODE)

    def _files(self, name: str) -> list[Path]:
        """The files of a set, the newest round last."""
        return sorted(self._folder.glob(f"{name}-*.safetensors"), key=_round)


def _round(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])
