"""The examples of a node in a run without privacy, or one whose coordinator is trusted: read whole, or not at all."""

from dataclasses import dataclass
from functools import lru_cache

from common import base, sources, tasks
from common.config import DataConfig, ModelConfig, TaskConfig
from common.error import BouquetError
from common.node_config import NodeConfig
from common.sources import Stamp
from common.tasks import Example


@dataclass(frozen=True)
class Examples:
    """A node's tokenised examples."""

    train: list[Example]
    heldout: list[Example]


@lru_cache(maxsize=8)
def node_examples(
    data: DataConfig, node: NodeConfig, task: TaskConfig, model: ModelConfig, seed: int, stamp: Stamp
) -> Examples:
    """Read, split and tokenise once a process; a simulation runs several nodes in one."""
    kind = tasks.build(task)
    dataset = sources.node_dataset(data, node, seed)
    kind.check(dataset.column_names, where=node.data or data.source)
    tokenizer = base.load_tokenizer(model)
    own, heldout = sources.split(dataset, data.holdout, seed)
    parts = [
        [example for record in part for example in kind.encode(record, tokenizer)]
        for part in (sources.pool(data, node, seed) if data.pooled else own, heldout)
    ]
    for name, part in zip(("train on", "hold out"), parts, strict=True):
        if not part:
            raise BouquetError(
                "a node has too few examples", where=f"{node.label}, {node.data or data.source}", got=f"none to {name}"
            )
    return Examples(*parts)
