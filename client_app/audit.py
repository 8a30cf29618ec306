"""The audit log of this machine: one line of JSON, of mode 0600, for every message before it leaves."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from common import durable, owned, wire
from common.config.node import NodeConfig
from common.json_files import is_torn
from common.stamp import utc_now


def path(directory: Path) -> Path:
    """The log's file in a node's state directory."""
    return directory / "audit.jsonl"


def run_name(context: Context) -> str:
    """What a node's books call a run: its name, which it keeps when it is resumed, or Flower's id."""
    return str(context.run_config.get("run-name") or context.run_id)[:100]


def write(
    node: NodeConfig, received: Message, content: RecordDict, run: str, round: int, epsilon: float | None
) -> None:
    """Write down that ``content`` answers ``received``; on the disk when this returns.

    ``run`` and ``round`` are what the ledger calls them, too; the round of a roll call, and of a message whose state
    was not read, is 0. ``epsilon`` is what the data has cost with this message, None where it costs nothing. Raises
    :class:`DiskError` where the disk does not take the whole line.
    """
    line = {
        "time": utc_now(),
        "node": node.label,
        "run": run,
        "round": round,
        "message": received.metadata.message_type,
        **_described(content),
        "epsilon": epsilon,
    }
    with durable.writing("the audit log", path(node.state), durable.OF_A_NODE):
        if not node.state.exists():
            owned.make_folder(node.state)
        _append(path(node.state), json.dumps(line) + "\n")


def _append(file: Path, line: str) -> None:
    """Add a line for good, after the end of one that a full disk has cut short."""
    # One write in append mode: nodes of a simulation share the file.
    log = os.open(file, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    try:
        content = (f"\n{line}" if is_torn(log) else line).encode()
        if os.write(log, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(log)
    finally:
        os.close(log)


def _described(content: RecordDict) -> dict[str, Any]:
    """What a reply holds: its records, its tensors and their bytes, every figure and fact, and a digest of it all."""
    sha = hashlib.sha256()
    tensors = size = 0
    for name, arrays in sorted(content.array_records.items()):
        tensors += len(wire.read_header(arrays).tensors)
        size += wire.payload_bytes(arrays)
        for key, array in arrays.items():
            sha.update(f"{name}/{key}".encode() + array.data)
    said = {name: dict(record) for name, record in content.metric_records.items()} | {
        name: dict(record) for name, record in content.config_records.items()
    }
    sha.update(json.dumps(said, sort_keys=True, default=repr).encode())
    return {"records": sorted(content), "tensors": tensors, "bytes": size, "digest": sha.hexdigest(), "said": said}
