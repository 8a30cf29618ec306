"""What local data settles before a simulation starts: how it is divided, and its classes.

On real nodes nobody sees the data of all, and whoever starts the run says both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import tasks
from common.config.run import RunConfig
from common.error import BouquetError
from common.sources import records
from common.sources.fields import in_order
from common.sources.files import files
from common.sources.records import Placed, broken, content, fields
from deploy.settings import SHIPPED
from strategies import read_config

FEW = 10
"""Of the classes that are found, how many are told."""
DEALING = {"data.partition", "data.partition-field"}


def settled(flat: Mapping[str, Any], nodes: int) -> tuple[dict[str, Any], list[str]]:
    """The settings with what they leave open, and a line for each choice that was made.

    Only what the user has not set is chosen, and nothing by the data of a private run. Raises :class:`BouquetError`
    where a file or a folder is not there, and with the first records that are broken.
    """
    config = read_config(flat)
    _check_folder("model", "model.name", config.model.name, "'embedded', a Transformers folder,")
    _check_folder("adapter", "model.adapter", config.model.adapter, "a PEFT folder")
    if config.data.source in SHIPPED or (found := files(config.data.source)) is None:
        return dict(flat), []
    open_dealing = not DEALING & set(flat)
    if config.privacy.on:
        if not open_dealing:
            return dict(flat), []
        return {**flat, "data.partition": "iid"}, ["data.partition=iid: each record is assigned to a node on its own"]
    read = [placed for file in found for placed in records.read(file)]
    if faults := [placed for placed in read if isinstance(placed.found, BouquetError)]:
        raise broken(faults, len(read), where=config.data.source)
    chosen, said = dict(flat), []
    if open_dealing:
        partition, why = _partition(read, config.data.partition_field, nodes)
        chosen["data.partition"] = partition
        said.append(f"data.partition={partition}: {why}")
    if not config.task.names:
        classes = _classes(read, config)
        if classes:
            chosen["task.classes"] = ",".join(classes)
            more = f", and {len(classes) - FEW} more" if len(classes) > FEW else ""
            said.append(
                f"{len(classes)} classes found in '{config.task.label}': {', '.join(classes[:FEW])}{more}; "
                "set task.classes to name them yourself"
            )
    return chosen, said


def _check_folder(kind: str, where: str, name: str, wanted: str) -> None:
    """Raise :class:`BouquetError` where a folder is not there; a hub id is asked for when it is loaded."""
    path = Path(name).expanduser()
    if (path.is_absolute() or name.startswith((".", "~"))) and not path.is_dir():
        raise BouquetError(f"there is no such {kind} folder", where=where, got=name, cure=f"Use {wanted} or a hub id.")


def _partition(read: Sequence[Placed], field: str, nodes: int) -> tuple[str, str]:
    """How the records are dealt out, and why so."""
    if field not in fields(read):
        return (
            "iid",
            f"the data has no field '{field}' (data.partition-field names another)",
        )
    different = len(set(records.values(read, field)))
    if different < nodes:
        return "iid", f"the field '{field}' has {different} values, fewer than the {nodes} nodes"
    return "natural", f"each node has its own value of '{field}'"


def _classes(read: Sequence[Placed], config: RunConfig) -> list[str]:
    """The classes that the labels name; none where they are the numbers that the run counts on.

    Raises :class:`BouquetError` where what stands in the field is no label.
    """
    name, task = config.task.label, tasks.build(config.task)
    found = {label for placed in read for label in task.named(content(placed))}
    if found <= {*map(str, range(config.task.labels)), "true", "false"}:
        return []
    odd = sorted(each for each in found if "," in each) or sorted(found)
    if len(found) == 1:
        raise BouquetError(
            "a field that holds only one label",
            where=f"task.label = '{name}', {config.data.source}",
            expected="two labels or more",
            got=f"{odd[0][:80]!r} in all of {len(read)} records",
            cure="Name the field of the labels with task.label, or all classes with task.classes.",
        )
    if 3 * len(found) > max(6, 2 * len(read)) or "," in odd[0]:
        raise BouquetError(
            "a field that holds no labels",
            where=f"task.label = '{name}', {config.data.source}",
            expected="a few different labels, none with a comma",
            got=f"{len(found)} different ones in {len(read)} records, such as {odd[0][:80]!r}",
            cure="Name the field of the labels with task.label.",
        )
    return in_order(found)
