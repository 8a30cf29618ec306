"""The records of a private node, each assigned independently: one more in its data is one more here, no other changes.

Everything between the file and the engine is *1-stable*: each record is read, dealt out, kept or left out by itself. So
nothing here shuffles, counts or cuts off; what has to choose does it by a hash of the record's own content. A record
that cannot be read is absent, whatever is wrong with it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator

from common.config.node import NodeConfig
from common.config.run import DataConfig
from common.error import BouquetError
from common.sources import dealing
from common.sources.records import Record


def node_records(data: DataConfig, node: NodeConfig, seed: int) -> list[Record]:
    """The records of one node: its own file's, or its part of the run's source.

    Raises :class:`BouquetError` where there is no such source.
    """
    found = read(node.data or data.source)
    return list(found if node.data or data.partition == "none" else _dealt(found, data, node, seed))


def chance(record: Record, key: str) -> float:
    """A number from 0 to 1 that a record's content and ``key`` decide, evenly and by nothing else."""
    content = json.dumps(record, sort_keys=True, default=repr)
    return int.from_bytes(hashlib.sha256(f"{key}\0{content}".encode(errors="replace")).digest()[:7]) / 2**56


def read(source: str) -> Iterator[Record]:
    """Every record of a source that can be read. Raises :class:`BouquetError` where there is no such source."""
    return (placed.found for placed in dealing.each(source) if not isinstance(placed.found, BouquetError))


def _dealt(found: Iterable[Record], data: DataConfig, node: NodeConfig, seed: int) -> Iterator[Record]:
    """The node's part: each record goes where its own content, or its own value of the partition field, says.

    Which values that field has is taken as public, as it is in a simulation, where one user has all of them.
    """
    if data.partition == "iid":
        nodes, own = node.num_partitions, node.partition_id
        return (record for record in found if int(chance(record, f"deal {seed}") * nodes) == own)
    named = [record for record in found if record.get(data.partition_field) is not None]
    values = sorted({str(record[data.partition_field]) for record in named})
    if node.partition_id >= len(values):
        raise BouquetError(
            "more nodes than partitions",
            where=f"{node.label}, data.partition = '{data.partition}'",
            expected=f"at most {len(values)} nodes",
            got=f"partition-id {node.partition_id}",
            cure=f"Use fewer nodes, or data.partition = 'iid' for records without '{data.partition_field}' "
            "(data.partition-field).",
        )
    return (record for record in named if str(record[data.partition_field]) == values[node.partition_id])
