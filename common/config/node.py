"""The config of one machine, as its operator writes it on the command line of ``flower-supernode``."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from common.config.ranges import Count, CountOrOff, Delta, NodeName, NonNegative, Positive
from common.config.section import Section, validate
from common.error import BouquetError

STATE_DIRECTORY = Path.home() / ".bouquet" / "state"


def _absolute(path: str) -> str:
    if path and not Path(path).expanduser().is_absolute():
        raise PydanticCustomError("relative_path", "an absolute path, since an app does not run where it was started")
    return path


class NodeConfig(Section):
    """Facts of one machine, from ``flower-supernode --node-config``; a simulation sets the first two.

    ``data`` replaces the run's ``data.source`` and is used whole; ``device`` is ``auto`` or a torch device. ``warm`` is
    how many idle seconds a worker keeps the model in memory between messages (0: no worker). ``weight`` is the node's
    public weight in the mean, for ``train.weighting = "declared"``; ``records`` is the public number of its records
    (or of its persons, where they are what is protected), for private runs. ``privacy_epsilon`` at
    ``privacy_delta`` is what the data may cost over all runs, 0 for no limit; ``privacy_witness`` is the file outside
    the state directory that holds the newest row of what was spent. ``policy`` is a file of ``client_app/policy.py``.
    """

    partition_id: CountOrOff = 0
    num_partitions: Count = 1
    name: NodeName = ""
    data: str = ""
    lora_rank: CountOrOff = 0
    device: str = "auto"
    state_directory: Annotated[str, AfterValidator(_absolute)] = ""
    warm: NonNegative = 0.0
    weight: Positive = 1.0
    records: CountOrOff = 0
    privacy_epsilon: NonNegative = 0.0
    privacy_delta: Delta = 1e-5
    privacy_witness: Annotated[str, AfterValidator(_absolute)] = ""
    policy: Annotated[str, AfterValidator(_absolute)] = ""

    @classmethod
    def from_flower(cls, flat: Mapping[str, Any], file: Path | None = None) -> Self:
        """Read Flower's node config, from a ``file`` maybe. Raises :class:`ConfigError` with every mistake."""
        state, witness, mistakes = flat.get("state-directory"), flat.get("privacy-witness"), list[str]()
        if flat.get("privacy-epsilon") and not state:
            mistakes.append("state-directory: expected a folder of its own for privacy-epsilon, got none")
        if state and witness and Path(str(witness)).is_relative_to(Path(str(state))):
            mistakes.append(f"privacy-witness: expected a file outside the state-directory {state}, got {witness!r}")
        where, place = (
            f"node config {file}" if file else "node config",
            file or "--node-config of this flower-supernode",
        )
        return validate(cls, flat, mistakes, where, f"Correct them in {place}.")

    @classmethod
    def read(cls, file: Path) -> Self:
        """The config in a kit's ``node.toml``. Raises :class:`BouquetError` where it is not such a file."""
        try:
            return cls.from_flower(tomllib.loads(file.read_text(encoding="utf-8")), file)
        except (OSError, ValueError) as error:
            raise BouquetError(
                "a node's config cannot be read", where=str(file), got=str(error), cure="Name a kit's node.toml."
            ) from error

    @property
    def label(self) -> str:
        """The node's stable name: it orders the merge and seeds the node, whatever id Flower gives it."""
        return self.name or f"node-{self.partition_id:03d}"

    @property
    def state(self) -> Path:
        """The folder of everything that outlives a run on this machine."""
        return Path(self.state_directory or STATE_DIRECTORY).expanduser()

    @property
    def ledger(self) -> Path:
        """The folder of what the data has cost: the state directory, or one of the node's in that of a simulation."""
        return self.state if self.state_directory else self.state / self.label

    @property
    def witness(self) -> Path:
        """The file that holds the newest row of the ledger, outside its folder."""
        return Path(self.privacy_witness).expanduser() if self.privacy_witness else witness_of(self.ledger)


def witness_of(directory: Path) -> Path:
    """Where the witness of a state directory lies unless another place is named: beside the folder, not in it."""
    return directory.with_name(f"{directory.name}.witness") / "head"
