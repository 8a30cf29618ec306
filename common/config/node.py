"""The config of one machine: what its operator passes to ``flower-supernode``."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from common.config.ranges import Count, CountOrOff, Delta, NodeName, NonNegative, Only, Positive
from common.config.section import Section, validate
from common.error import BouquetError

STATE_DIRECTORY = Path.home() / ".bouquet" / "state"


AbsolutePath = Annotated[
    str,
    Only(
        lambda path: not path or Path(path).expanduser().is_absolute(),
        "an absolute path, since an app does not run in the folder it was started from",
    ),
]


class NodeConfig(Section):
    """Facts of one machine, from ``flower-supernode --node-config``."""

    partition_id: CountOrOff = 0
    """Which part of the data a simulated node has; a simulation sets it."""
    num_partitions: Count = 1
    """How many parts there are; a simulation sets it."""
    name: NodeName = ""
    """The node's stable name; empty to name it by its partition. On a site the roster decides."""
    data: str = ""
    """The node's own data, which replaces `data.source` and is used whole; empty for the run's."""
    script: AbsolutePath = ""
    """The operator's own Python script, whose trainer replaces `data`; empty for none."""
    lora_rank: CountOrOff = 0
    """The node's own, smaller rank, under rules that allow mixed ranks; 0 for the run's."""
    device: str = "auto"
    """auto or a torch device; the devices of `cuda:0,cuda:1` share each step, those of `cuda:0+cuda:1` one model."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """How attention is computed: auto is torch's where the model has it; flash needs flash-attn, a GPU and 16 bits."""
    compile: bool = False
    """Whether to compile the model's blocks; takes minutes in every process: for long rounds with `warm`."""
    kernels: Literal["auto", "liger"] = "auto"
    """Whose kernels compute norms, rotary positions and gated layers: liger needs liger-kernel and a GPU."""
    state_directory: AbsolutePath = ""
    """The folder of everything that outlives a run on this machine; empty for `~/.bouquet/state`."""
    warm: NonNegative = 0.0
    """Idle seconds for which a worker keeps the model in memory between messages; 0 for no worker."""
    weight: Positive = 1.0
    """The node's public weight in the mean, for `train.weighting` = declared."""
    records: CountOrOff = 0
    """The public number of its records, or of persons where they are protected; 0 for the run's `privacy.records`."""
    privacy_epsilon: NonNegative = 0.0
    """The epsilon that all runs together may spend, at `privacy-delta`; 0 for no limit."""
    privacy_delta: Delta = 1e-5
    """The delta at which that budget holds."""
    privacy_witness: AbsolutePath = ""
    """The file outside the state directory that holds the ledger's newest row; empty for one beside the directory."""
    policy: AbsolutePath = ""
    """The operator's policy, a TOML file; empty for none."""

    @classmethod
    def from_flower(cls, flat: Mapping[str, Any], file: Path | None = None) -> Self:
        """Read Flower's node config, from a ``file`` maybe. Raises :class:`ConfigError` with every mistake."""
        state, witness, mistakes = flat.get("state-directory"), flat.get("privacy-witness"), list[str]()
        if flat.get("privacy-epsilon") and not state:
            mistakes.append("state-directory: expected a folder of its own for privacy-epsilon, got none")
        if state and witness and Path(str(witness)).is_relative_to(Path(str(state))):
            mistakes.append(f"privacy-witness: expected a file outside the state-directory {state}, got {witness!r}")
        if flat.get("script") and flat.get("data"):
            mistakes.append(f"data: expected none with a script, which has its own, got {flat['data']!r}")
        if flat.get("script") and {",", "+"} & set(str(flat.get("device"))):
            mistakes.append(
                f"device: expected one with a script, whose trainer uses a single device, got {flat['device']!r}"
            )
        computed = flat.get("compile") or {flat.get("attention", "auto"), flat.get("kernels", "auto")} != {"auto"}
        if flat.get("script") and computed:
            mistakes.append("attention, compile, kernels: expected none with a script, which has its own model")
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
    def devices(self) -> Sequence[str]:
        """The devices of the node's processes, one each."""
        return [each.strip() for each in self.device.split(",")]

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
