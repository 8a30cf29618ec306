"""Where examples come from, and how a simulation deals them out to its nodes."""

import ast
import gzip
import json
import sysconfig
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner, Partitioner

from common.config import DataConfig
from common.error import BouquetError, did_you_mean
from common.node_config import NodeConfig

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# Families of standard library modules that every Python has had for years: what each node of the embedded data knows.
FAMILIES = {
    "concurrency": ("asyncio", "concurrent", "threading", "selectors"),
    "network": ("email", "http", "urllib", "socketserver"),
    "testing": ("unittest", "doctest", "pdb", "trace"),
    "formats": ("json", "csv", "xml", "zipfile", "tarfile"),
    "numbers": ("statistics", "fractions", "_pydecimal", "random", "datetime", "_pydatetime"),
    "language": ("inspect", "dataclasses", "functools", "collections", "argparse"),
}


def node_dataset(data: DataConfig, node: NodeConfig, seed: int) -> Dataset:
    """The examples of one node: its own file, or its partition of the run's source. Raises :class:`BouquetError`."""
    dataset = own_records(data, node, seed)
    if len(dataset) < 2:
        raise BouquetError(
            "a node has too few examples",
            where=f"{node.label}, {node.data or data.source}",
            expected="at least 2, to train on one and hold one out",
            got=str(len(dataset)),
            cure="Use fewer nodes, another data.partition, or more data.",
        )
    return dataset.shuffle(seed=seed).select(range(min(len(dataset), data.limit or len(dataset))))


def own_records(data: DataConfig, node: NodeConfig, seed: int) -> Dataset:
    """Every record of one node, before ``data.limit`` and the split choose among them."""
    dataset = read(node.data or data.source)
    return dataset if node.data or data.partition == "none" else _partition(dataset, data, node, seed)


def split(dataset: Dataset, holdout: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out examples; at least one of each."""
    size = min(max(1, round(holdout * len(dataset))), len(dataset) - 1)
    parts = dataset.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def pool(data: DataConfig, node: NodeConfig, seed: int) -> Dataset:
    """The training examples of all nodes of a simulation, none of what any of them holds out.

    Raises :class:`BouquetError` on a node with data of its own, which knows no other node's.
    """
    if node.data:
        raise BouquetError(
            "a node with its own data cannot train on the others'",
            where=f"{node.label}, data.pooled = true",
            cure="data.pooled is a baseline for simulations: leave it false.",
        )
    nodes = (node.model_copy(update={"partition_id": number}) for number in range(node.num_partitions))
    return concatenate_datasets([split(node_dataset(data, each, seed), data.holdout, seed)[0] for each in nodes])


def read(source: str) -> Dataset:
    """All records of a source, read once as it is. Raises :class:`BouquetError` that names the file and the line."""
    return _read(source, stamp(source))


Stamp = tuple[tuple[str, int, int, int], ...]


def stamp(source: str) -> Stamp:
    """What tells the files of a source from what they were before; nothing for what is no path."""
    facts = [(str(file), file.stat()) for file in files(source) or ()]
    return tuple((name, fact.st_mtime_ns, fact.st_size, fact.st_ino) for name, fact in facts)


@lru_cache(maxsize=2)
def _read(source: str, stamp: Stamp) -> Dataset:
    if source == "stdlib":
        return Dataset.from_list(list(stdlib_records()))
    found = files(source)
    return _read_hub(source) if found is None else _read_files(found)


def files(source: str) -> list[Path] | None:
    """The files of a source, all of one form; None for what is no path. Raises :class:`BouquetError`."""
    path = Path(source).expanduser()
    if source == "stdlib":
        return None
    if path.exists():
        found = [path] if path.is_file() else sorted(file for file in path.iterdir() if reader(file))
        if not found or not all(map(reader, found)):
            raise BouquetError(
                "no file of a known form",
                where=str(path),
                expected=f"{', '.join(READERS)} (or .gz of one)",
                got=path.name,
            )
        if len(kinds := {reader(file) for file in found}) > 1:
            raise BouquetError("files of several forms in one folder", where=str(path), got=", ".join(map(str, kinds)))
        return found
    if path.is_absolute() or source.startswith((".", "~")) or reader(path):
        raise BouquetError(
            "there is no such file or folder",
            where="data.source",
            got=source,
            cure="Use an absolute path: an app does not run in the folder it was started from.",
        )
    return None


def stdlib_records() -> Iterator[dict[str, Any]]:
    """Top-level functions and classes of the standard library on this machine, docstrings left out.

    Fields: ``family``, ``module``, ``text``. The base model was pretrained on docstrings, so that held-out text that
    still had them would be known to it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for family, modules in FAMILIES.items():
        for module in modules:
            package = root / module
            files = sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{module}.py"]
            for file in files:
                if file.exists() and "test" not in file.relative_to(root).parts:
                    for text in _definitions(file.read_text(encoding="utf-8")):
                        yield {"family": family, "module": file.relative_to(root).as_posix(), "text": text}


def _definitions(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    lines = source.splitlines()
    docstrings: set[int] = set()
    for node in _statements(tree):
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kept = [
                lines[number - 1]
                for number in range(node.lineno, (node.end_lineno or 0) + 1)
                if number not in docstrings
            ]
            yield "\n".join(kept) + "\n"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below ``node``; unlike ``ast.walk``, without the expressions, which are most of a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from _statements(child)


def _partition(dataset: Dataset, data: DataConfig, node: NodeConfig, seed: int) -> Dataset:
    if data.partition != "iid" and data.partition_field not in dataset.column_names:
        raise BouquetError(
            "the data has no such field",
            where="data.partition-field",
            expected=f"one of {', '.join(dataset.column_names)}",
            got=f"'{data.partition_field}'",
            cure=f"{did_you_mean(data.partition_field, dataset.column_names)} Or set data.partition = 'iid'.".strip(),
        )
    partitioner: Partitioner
    if data.partition == "iid":
        dataset = dataset.shuffle(seed=seed)
        partitioner = IidPartitioner(num_partitions=node.num_partitions)
    elif data.partition == "dirichlet":
        partitioner = DirichletPartitioner(
            num_partitions=node.num_partitions,
            partition_by=data.partition_field,
            alpha=data.dirichlet_alpha,
            min_partition_size=2,
            seed=seed,
        )
    else:
        partitioner = NaturalIdPartitioner(partition_by=data.partition_field)
    partitioner.dataset = dataset
    with redirect_stderr(StringIO()):  # progress bars for work of a millisecond
        if node.partition_id < partitioner.num_partitions:
            return partitioner.load_partition(node.partition_id)
    raise BouquetError(
        "more nodes than partitions",
        where=f"{node.label}, data.partition = '{data.partition}'",
        expected=f"at most {partitioner.num_partitions} nodes",
        got=f"partition-id {node.partition_id}",
        cure="Use fewer nodes or data.partition = 'iid'.",
    )


def reader(path: Path) -> str | None:
    """How a file is read, by its ending: json, csv or parquet; None where nothing here reads it."""
    return READERS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


def _read_files(files: list[Path]) -> Dataset:
    try:
        return load_dataset(reader(files[0]), data_files=list(map(str, files)), split="train")
    except (DatasetGenerationError, ValueError) as error:
        if reader(files[0]) == "json":
            for file in files:
                _check_json_lines(file)
        cause = error.__cause__ or error
        raise BouquetError("a data file cannot be read", where=str(files[0]), got=str(cause).splitlines()[0]) from error


def _check_json_lines(file: Path) -> None:
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise BouquetError(
                    "a line is not JSON",
                    where=f"{file}:{number}",
                    expected="one JSON object a line",
                    got=line.strip()[:80],
                ) from error
            if not isinstance(record, dict):
                raise BouquetError(
                    "a line is not an object",
                    where=f"{file}:{number}",
                    expected="one JSON object a line",
                    got=line[:80],
                )


def _read_hub(source: str) -> Dataset:
    try:
        loaded = load_dataset(source)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise BouquetError(
            "there is no such file, folder or reachable hub data set",
            where="data.source",
            got=f"'{source}' ({str(error).splitlines()[0]})",
            cure="Use 'stdlib', an absolute path, or a hub id; offline, the data set must be in the hub cache.",
        ) from error
    return loaded["train"] if isinstance(loaded, DatasetDict) and "train" in loaded else next(iter(loaded.values()))
