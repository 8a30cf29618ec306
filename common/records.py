"""The records of a private node, read so that one more in its data is one more here and changes nothing else.

A private run promises that nobody can tell two data sets apart of which one has one record more. That holds only if
everything between the file and the engine is *1-stable*: each record is read, dealt out, kept or left out by itself. So
nothing here infers a type from other records, shuffles, counts or cuts off; what has to choose does it by a hash of the
record's own content. A record that cannot be read is absent, whatever is wrong with it.

In CSV a record is what the file's quotation marks make of it; JSON lines are the form in which one broken line is one
absent record.
"""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import sources
from common.config import DataConfig
from common.error import BouquetError
from common.node_config import NodeConfig

Record = Mapping[str, Any]


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


def read(source: str) -> Iterable[Record]:
    """Every record of a source that can be read. Raises :class:`BouquetError` where there is no such source."""
    files = sources.files(source)
    if files is None:
        return _each(sources.read(source))
    one = _table if sources.reader(files[0]) == "parquet" else _lines
    return (record for file in files for record in one(file))


def _each(dataset: Any) -> Iterator[Record]:
    for number in range(len(dataset)):
        try:
            record = dataset[number]
        except Exception:  # noqa: S112 - absent; in an iterator it would end the reading of all that follow
            continue
        yield record


def _table(file: Path) -> Iterator[Record]:
    """The records of a Parquet file, by itself: the types of its columns may not be those of the others."""
    with suppress(BouquetError):
        yield from _each(sources.read(str(file)))


def _lines(file: Path) -> Iterator[Record]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    # Where a file breaks off, what came before has been read.
    with suppress(OSError, EOFError, zlib.error), opener(file, "rb") as opened:
        if sources.reader(file) == "csv":
            yield from _rows(opened)
        elif file.name.removesuffix(".gz").endswith(".json"):
            yield from _whole(opened.read())
        else:
            for line in opened:
                yield from _objects(line)


def _rows(lines: Iterable[bytes]) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # a long field would end the reading of all that follow
    rows = csv.DictReader(line.decode(errors="replace") for line in lines)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            continue
        if None not in row:
            yield row


def _whole(content: bytes) -> Iterator[Record]:
    """The objects of a file that is one JSON array, or JSON lines under another name."""
    try:
        values = json.loads(content, parse_int=_whole_number)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, list):
        yield from _usable(values)
    else:
        for line in content.splitlines():
            yield from _objects(line)


def _objects(line: bytes) -> Iterator[Record]:
    try:
        value = json.loads(line, parse_int=_whole_number)
    except (ValueError, RecursionError):
        return
    yield from _usable([value])


def _whole_number(digits: str) -> int | str:
    """A number, or its digits where Python reads no more of them, which would end the reading of what is around it."""
    return int(digits) if len(digits) <= 1000 else digits


def _usable(values: list[Any]) -> Iterator[Record]:
    """The objects among values, but for what is nested so deeply that whatever reads it again may fail."""
    return (value for value in values if isinstance(value, dict) and _shallow(value))


def _shallow(value: Any, levels: int = 50) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(each, levels - 1) for each in inner)


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
