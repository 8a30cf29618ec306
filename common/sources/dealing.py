"""Where examples come from, and how a plain run divides them among its nodes.

A private run's dealing, which knows no other record, is in ``common/sources/stable.py``.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import lru_cache
from io import StringIO
from typing import TYPE_CHECKING, Any, TypeVar

from datasets import Dataset, DatasetDict, Image, load_dataset

from common.config.node import NodeConfig
from common.config.run import DataConfig
from common.error import BouquetError
from common.sources import records, stdlib
from common.sources.fields import in_order
from common.sources.files import Stamp, files, stamp
from common.sources.records import Placed, broken

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def node_records(data: DataConfig, node: NodeConfig, seed: int) -> Sequence[Placed]:
    """The records of one node: its own file's, or its partition of the run's source. Raises :class:`BouquetError`."""
    own = own_records(data, node, seed)
    return _chosen(own, _numbered(len(own)).shuffle(seed=seed))[: data.limit or None]


def own_records(data: DataConfig, node: NodeConfig, seed: int) -> Sequence[Placed]:
    """Every record of one node, before ``data.limit`` and the split choose among them."""
    found = read(node.data or data.source)
    return found if node.data or data.partition == "none" else _partition(found, data, node, seed)


T = TypeVar("T")


def split(found: Sequence[T], holdout: float, seed: int) -> tuple[list[T], list[T]]:
    """The training and the held-out part of two or more; at least one in each."""
    size = min(max(1, round(holdout * len(found))), len(found) - 1)
    parts = _numbered(len(found)).train_test_split(test_size=size, seed=seed)
    return _chosen(found, parts["train"]), _chosen(found, parts["test"])


def read(source: str, setting: str = "data.source") -> Sequence[Placed]:
    """All records of a source, read once as it is. Raises :class:`BouquetError` with the first that are broken."""
    return _read(source, stamp(source, setting), setting)


@lru_cache(maxsize=2)
def _read(source: str, stamp: Stamp, setting: str) -> Sequence[Placed]:
    found = list(each(source, setting))
    if faults := [placed for placed in found if isinstance(placed.found, BouquetError)]:
        raise broken(faults, len(found), where=source)
    return found


def each(source: str, setting: str = "data.source") -> Iterator[Placed]:
    """Every record of a source, or what is wrong with it. Raises :class:`BouquetError` where there is no source."""
    if source == "stdlib":
        return _counted(stdlib.records())
    found = files(source, setting)
    if found is None:
        return _counted(_hub(source, setting))
    return (placed for file in found for placed in records.read(file))


def _counted(found: Iterable[Any]) -> Iterator[Placed]:
    return (Placed(f"record {number}", record) for number, record in enumerate(found, start=1))


def _numbered(count: int, key: Sequence[int] = ()) -> Dataset:
    """The numbers of records, and a ``key`` for each, as a data set that is dealt out in the place of the records."""
    return Dataset.from_dict({"number": range(count)} | ({"key": key} if key else {}))


def _chosen(found: Sequence[T], numbers: Dataset) -> list[T]:
    return [found[number] for number in numbers["number"]]


def _partition(found: Sequence[Placed], data: DataConfig, node: NodeConfig, seed: int) -> Sequence[Placed]:
    partitioner, dataset = _partitioner(found, data, node, seed)
    partitioner.dataset = dataset
    try:
        # Progress bars for work of a millisecond, and a warning for every draw of Dirichlet's that is drawn again.
        with redirect_stderr(StringIO()), warnings.catch_warnings(action="ignore"):
            if node.partition_id < partitioner.num_partitions:
                return _chosen(found, partitioner.load_partition(node.partition_id))
    except ValueError as error:
        raise BouquetError(
            "the records cannot be divided among so many nodes",
            where=f"data.partition = '{data.partition}', data.dirichlet-alpha = {data.dirichlet_alpha:g}",
            expected=f"at least 2 for each of {node.num_partitions} nodes",
            got=f"{len(found)} records",
            cure="Use fewer nodes, a larger data.dirichlet-alpha, more data, or data.partition = 'iid'.",
        ) from error
    raise BouquetError(
        "more nodes than partitions",
        where=f"{node.label}, data.partition = '{data.partition}'",
        expected=f"at most {partitioner.num_partitions} nodes",
        got=f"partition-id {node.partition_id}",
        cure="Use fewer nodes or data.partition = 'iid'.",
    )


def _partitioner(
    found: Sequence[Placed], data: DataConfig, node: NodeConfig, seed: int
) -> tuple["Partitioner", Dataset]:
    """Who deals out the records' numbers, and those."""
    # It takes a second to import, charts and all, and a node that has data of its own does without.
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    if data.partition == "iid":
        return IidPartitioner(num_partitions=node.num_partitions), _numbered(len(found)).shuffle(seed=seed)
    said = records.values(found, data.partition_field)
    place = {value: number for number, value in enumerate(in_order(said))}
    dataset = _numbered(len(found), [place[value] for value in said])
    if data.partition == "natural":
        return NaturalIdPartitioner(partition_by="key"), dataset
    return (
        DirichletPartitioner(
            num_partitions=node.num_partitions,
            partition_by="key",
            alpha=data.dirichlet_alpha,
            min_partition_size=2,
            seed=seed,
        ),
        dataset,
    )


def _hub(source: str, setting: str) -> Iterator[Any]:
    try:
        loaded = load_dataset(source)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise BouquetError(
            "there is no such file, folder or reachable hub data set",
            where=setting,
            got=f"'{source}' ({str(error).splitlines()[0]})",
            cure="Use 'stdlib', an absolute path, or a hub id; offline, the data set must be in the hub cache.",
        ) from error
    split = loaded["train"] if isinstance(loaded, DatasetDict) and "train" in loaded else loaded
    dataset = next(iter(split.values())) if isinstance(split, DatasetDict) else split
    return decoded(stored(dataset))


def stored(dataset: Any) -> Any:
    """A data set whose images are what stands in their files: whoever wants them decodes them, within bounds."""
    for name, kind in dataset.features.items():
        if isinstance(kind, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def decoded(dataset: Sequence[Any]) -> Iterator[Any]:
    """Every record of a data set, or what keeps it from being decoded."""
    for number in range(len(dataset)):
        try:
            yield dataset[number]
        except Exception as error:  # whatever a decoder raises; in an iterator it would end the reading of all others
            yield BouquetError("a record cannot be decoded", got=str(error))
