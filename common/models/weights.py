"""The files of a base model: whether they are whole, and which model they are."""

import hashlib
import json
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.error import BouquetError
from common.models.head import inside

SHOWN = 3
CHUNK = 2**24


def check_whole(found: Mapping[str, Collection[Any]], fresh: Collection[str], where: str) -> None:
    """Raise :class:`BouquetError` for a weight that the checkpoint lacks, or has in another shape, outside ``fresh``.

    ``found`` is what Transformers says of the loading.
    """
    missing = set(found["missing_keys"]) | {key for key, *_ in found["mismatched_keys"]}
    lost = sorted(name for name in missing if not inside(name, fresh))
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise BouquetError(
            "the checkpoint lacks weights of the model, or has them in a different shape",
            where=where,
            expected="every weight but the head's",
            got=f"no {', '.join(lost[:SHOWN])}{more}",
            cure="Download it again. If only a pooler is missing, model.pooling = 'mean' does without.",
        )


def check_files(folder: str) -> None:
    """Raise :class:`BouquetError` that names the first weight file in a folder that cannot be read, if there is one."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            with file.open("rb") as opened:
                pointer = opened.read(32).startswith(b"version https://git-lfs")
            raise BouquetError(
                "a weight file cannot be read",
                where=str(file),
                expected="a whole safetensors file",
                got="a git-lfs pointer" if pointer else f"{file.stat().st_size:,} bytes ({error})",
                cure="Fetch it with 'git lfs pull'." if pointer else "Download it again.",
            ) from error


def there(folder: Path) -> bool:
    """Whether a folder has weights."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def digest(folder: Path) -> str:
    """What tells one base model from another: a hash over every tensor, by name, however they lie in files."""
    parts = sorted(part for file in sorted(folder.glob("*.safetensors")) for part in _tensors(file))
    if not parts:
        parts = sorted(_hash(file, 0, file.stat().st_size) for file in folder.glob("*.bin"))
    return hashlib.sha256(b"\0".join(part.encode() for part in parts)).hexdigest()


def settings(folder: Path, names: Iterable[str]) -> str:
    """What some JSON files of a folder say, as one text, however it is written there; nothing of those that lack."""
    there = [folder / name for name in names if (folder / name).is_file()]
    return json.dumps([json.loads(file.read_text(encoding="utf-8")) for file in there], sort_keys=True)


def _tensors(file: Path) -> Iterator[str]:
    """A line a tensor: its name, type and shape, and the hash of its bytes."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    for name, told in header.items():
        if name != "__metadata__":
            first, end = told["data_offsets"]
            yield f"{name} {told['dtype']} {told['shape']} {_hash(file, 8 + size + first, end - first)}"


def _hash(file: Path, start: int, length: int) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(start)
        while length and (chunk := opened.read(min(length, CHUNK))):
            sha.update(chunk)
            length -= len(chunk)
    return sha.hexdigest()
