"""The examples of a node in a run without privacy, or one whose coordinator is trusted: read whole, or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.config.node import NodeConfig
from common.config.run import DataConfig, ModelConfig, TaskConfig
from common.error import BouquetError
from common.models import base, lengths
from common.sources import dealing
from common.sources.counts import Counts
from common.sources.files import Stamp
from common.tasks import Example


@dataclass(frozen=True)
class Examples:
    """A node's tokenised examples, and what became of the records that it has."""

    train: Sequence[Example]
    heldout: Sequence[Example]
    counts: Counts


@lru_cache(maxsize=8)
def node_examples(
    data: DataConfig, node: NodeConfig, task: TaskConfig, model: ModelConfig, seed: int, stamp: Stamp
) -> Examples:
    """Read, tokenise and split once a process; a simulation runs several nodes in one.

    Raises :class:`BouquetError` where a node has too few examples, or none of its own to hold out from the others.
    """
    found, source = dealing.node_records(data, node, seed), node.data or data.source
    _, encoded, counts = lengths.encoded(task, model, found, source)
    texts = (text for record in encoded for example in record for text in example.texts)
    base.check_words(model, (token for text in texts for token in text.tokens))
    if len(usable := list(filter(None, encoded))) < 2:
        raise BouquetError(
            "a node has too few examples",
            where=f"{node.label}, {source}",
            expected="at least 2, to train on one and hold one out",
            got=str(counts),
            cure="Use fewer nodes, another data.partition, or more data.",
        )
    train, heldout = dealing.split(usable, data.holdout, seed)
    own = [example for record in train for example in record]
    others = _pooled(data, node, task, model, seed, stamp) if data.pooled else own
    return Examples(others, [example for record in heldout for example in record], counts)


def _pooled(
    data: DataConfig, node: NodeConfig, task: TaskConfig, model: ModelConfig, seed: int, stamp: Stamp
) -> list[Example]:
    """The training examples of all nodes of a simulation, none of what any of them holds out."""
    if node.data:
        raise BouquetError(
            "a node with its own data cannot train on the others'",
            where=f"{node.label}, data.pooled = true",
            cure="data.pooled is a baseline for simulations: leave it false.",
        )
    alone = data.model_copy(update={"pooled": False})
    nodes = (node.model_copy(update={"partition_id": number}) for number in range(node.num_partitions))
    return [example for each in nodes for example in node_examples(alone, each, task, model, seed, stamp).train]
