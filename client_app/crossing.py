"""Units of examples as a node's processes pass them to each other: JSON, from which nothing is ever executed."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.sources.images import ImageFile
from common.tasks import Example


def packed(units: Sequence[Sequence[Example]]) -> bytes:
    """Units as they cross; of an image where its file is, or what is in the record."""
    return json.dumps(units, default=_written).encode()


def unpacked(units: bytes) -> list[list[Example]]:
    """What :func:`packed` has packed."""
    return [[_example(fields) for fields in unit] for unit in json.loads(units)]


def _written(image: ImageFile) -> Mapping[str, str]:
    if image.file is not None:
        return {"file": str(image.file)}
    return {"content": base64.b64encode(image.content).decode()}


def _example(fields: Sequence[Any]) -> Example:
    told = dict(zip(Example._fields, fields, strict=True))
    against, images = told.pop("against"), told.pop("images")
    return Example(**told, against=against and _example(against), images=tuple(map(_image, images)))


def _image(written: Mapping[str, str]) -> ImageFile:
    if "file" in written:
        return ImageFile(Path(written["file"]))
    return ImageFile(content=base64.b64decode(written["content"]))
