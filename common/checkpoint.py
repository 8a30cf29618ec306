"""The federation's state on disk, one file a round.

A checkpoint is a safetensors file whose metadata holds round, scale, rule and a digest of the tensors. It appears by
one rename; one that is torn or altered is recognised by its digest, and the one before it is used.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.adapter import OFFSET, Key, State, Tensors, digest
from common.error import BouquetError

# What the server remembers stands beside the adapter, under names that no layer has.
MEMORY = "memory/"


def save(folder: Path, state: State, rule: str) -> Path:
    """Write ``state`` durably; return the file. Raises :class:`BouquetError` where the disk does not take it."""
    tensors = state.adapter | state.offset
    for name, kept in state.memory.items():
        tensors |= {Key(f"{MEMORY}{name}/{key.layer}", key.part): tensor for key, tensor in kept.items()}
    facts = {"round": state.round, "scale": state.scale, "rule": rule, "digest": digest(tensors)}
    file = folder / f"round-{state.round:04d}.safetensors"
    try:
        _write(file, {str(key): tensor.contiguous() for key, tensor in tensors.items()}, json.dumps(facts))
    except (OSError, SafetensorError) as error:
        raise BouquetError(
            "a checkpoint cannot be written",
            where=str(file),
            got=str(error),
            cure="Make room on the disk; finished rounds are kept: start again with resume = true.",
        ) from error
    return file


def _write(file: Path, tensors: dict[str, Tensor], facts: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    building = file.with_suffix(".building")
    save_file(tensors, building, metadata={"bouquet": facts})
    with building.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(building, file)
    directory = os.open(file.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def load(file: Path, rule: str) -> State:
    """Read a checkpoint back. Raises :class:`BouquetError` if it is damaged or of another rule."""
    try:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads((opened.metadata() or {})["bouquet"])
            tensors = {Key(*name.rsplit(":", 1)): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise BouquetError("a checkpoint cannot be read", where=str(file), got=str(error)) from error
    if digest(tensors) != facts["digest"]:
        raise BouquetError("a checkpoint is damaged", where=str(file), expected="the digest it was written with")
    if facts["rule"] != rule:
        raise BouquetError("a checkpoint of another rule", where=str(file), expected=rule, got=str(facts["rule"]))
    adapter: Tensors = {}
    offset: Tensors = {}
    memory: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        if key.layer.startswith(MEMORY):
            name, layer = key.layer.removeprefix(MEMORY).split("/", 1)
            memory.setdefault(name, {})[Key(layer, key.part)] = tensor
        else:
            (offset if key.part in OFFSET else adapter)[key] = tensor
    return State(adapter, facts["scale"], facts["round"], offset, memory)


def latest(folder: Path, rule: str) -> State | None:
    """The newest checkpoint that is whole; None where there is none."""
    for file in sorted(folder.glob("round-*.safetensors"), reverse=True):
        try:
            return load(file, rule)
        except BouquetError as error:
            print(f"skipped: {error}", flush=True)
    return None
