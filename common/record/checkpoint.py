"""The federation's state on disk, one file per round.

A checkpoint is a safetensors file whose metadata holds round, scale, rule and seed, and a digest of them and the
tensors. It appears by one rename; one that is torn or altered is recognised by its digest, and the one before it is
used.
"""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from common import durable
from common.adapter.algebra import digest
from common.adapter.values import OFFSET, Key, State, Tensors
from common.error import BouquetError

FORMAT = 2
# What the server remembers stands beside the adapter, under names that no layer has.
MEMORY = "memory/"


def file_of(folder: Path, round: int) -> Path:
    """Where the state of ``round`` lies."""
    return folder / f"round-{round:04d}.safetensors"


def rounds(folder: Path) -> list[int]:
    """The rounds that have a checkpoint, in order."""
    found = (re.fullmatch(r"round-(\d+)\.safetensors", file.name) for file in folder.glob("round-*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def save(folder: Path, state: State, rule: str) -> Path:
    """Write ``state`` durably; return the file. Raises :class:`DiskError` where the disk does not take it."""
    tensors = state.adapter | state.offset
    for name, kept in state.memory.items():
        tensors |= {Key(f"{MEMORY}{name}/{key.layer}", key.part): tensor for key, tensor in kept.items()}
    facts = {"format": FORMAT, "round": state.round, "scale": state.scale, "rule": rule, "seed": state.seed}
    metadata = {"bouquet": json.dumps(facts), "digest": _digest(facts, tensors)}
    file = file_of(folder, state.round)
    with durable.writing("a checkpoint", file):
        folder.mkdir(parents=True, exist_ok=True)
        with durable.replacing(file) as building:
            save_file({str(key): tensor.contiguous() for key, tensor in tensors.items()}, building, metadata=metadata)
    return file


def prune(folder: Path, newest: int, every: int, also: Collection[int] = ()) -> None:
    """Leave the ``newest`` checkpoints, one ``every`` so many rounds (0: no more), and those of the rounds ``also``."""
    for number in rounds(folder)[:-newest]:
        if not (every and number % every == 0) and number not in also:
            file_of(folder, number).unlink(missing_ok=True)


def load(file: Path, rule: str) -> State:
    """Read a checkpoint back. Raises :class:`BouquetError` if it is damaged, of another rule or of another release."""
    try:
        facts, tensors = _read(file)
        if facts["rule"] != rule:
            raise BouquetError("a checkpoint of another rule", where=str(file), expected=rule, got=str(facts["rule"]))
        return _state(facts, tensors)
    except BouquetError:
        raise
    except Exception as error:  # a boundary: whatever a damaged file brings about
        raise BouquetError(
            "a checkpoint cannot be read", where=str(file), got=f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def latest(folder: Path, rule: str) -> State | None:
    """The newest checkpoint that is whole; None where there is none at all.

    Raises :class:`BouquetError` where there are some and none can be read: to start anew would lose them.
    """
    found = rounds(folder)
    for number in reversed(found):
        try:
            return load(file_of(folder, number), rule)
        except BouquetError as error:
            print(f"skipped: {error}", flush=True)
    if found:
        raise BouquetError(
            "no checkpoint of this run can be read",
            where=str(folder),
            got=f"{len(found)}; their errors are above",
            cure="Resume with the release and the rule that wrote them, or start a run with another name.",
        )
    return None


def _read(file: Path) -> tuple[dict[str, Any], Tensors]:
    """The facts and the tensors of a file whose digest is right."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        facts: dict[str, Any] = json.loads(metadata["bouquet"])
        if (found := facts.get("format", 1)) != FORMAT:
            raise BouquetError(
                "a checkpoint of another release",
                where=str(file),
                expected=f"format {FORMAT}",
                got=str(found),
                cure="Use the release that wrote it, or export the run's adapter folder.",
            )
        tensors = {Key.parse(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if _digest(facts, tensors) != metadata.get("digest"):
        raise BouquetError("a checkpoint is damaged", where=str(file), expected="the digest it was written with")
    return facts, tensors


def _digest(facts: dict[str, Any], tensors: Tensors) -> str:
    return hashlib.sha256(f"{json.dumps(facts, sort_keys=True)}{digest(tensors)}".encode()).hexdigest()


def _state(facts: dict[str, Any], tensors: Tensors) -> State:
    adapter: Tensors = {}
    offset: Tensors = {}
    memory: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        if key.layer.startswith(MEMORY):
            name, layer = key.layer.removeprefix(MEMORY).split("/", 1)
            memory.setdefault(name, {})[Key(layer, key.part)] = tensor
        else:
            (offset if key.part in OFFSET else adapter)[key] = tensor
    return State(adapter, facts["scale"], facts["round"], offset, memory, seed=facts["seed"])
