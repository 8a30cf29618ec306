"""Images of records: which file is meant, and what is in it, within bounds.

An image is a path, relative to the folder of the data, or an image file itself: in a text as a data URL (base64), in
Parquet as bytes. What a path names lies within that folder, whatever it says and whatever links lead through; nothing
is fetched from a network. A file of a few bytes may unfold to more than a machine's memory, so that its size in pixels
and its shape are looked at before it is decoded: processors scale an image by its shorter side, which makes a large one
of a narrow one.
"""

import base64
import io
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.error import BouquetError
from common.sources.fields import LeftOut

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""The formats that are read, by Pillow's names; of several frames the first."""

MOST_BYTES = 2**25
"""Of an image file."""

MOST_PIXELS = 2**26
"""Of an image: 67 million, as RGB 200 MB."""

MOST_RATIO = 100
"""How many times as long one side may be as the other."""

KEPT = 100_000
"""Of how many files a process remembers that they can be decoded, and their size."""

NOISE = 32
"""The sides of a made-up image, in pixels."""


@dataclass(frozen=True)
class ImageFile:
    """An image as it is stored: a ``file``, or the ``content`` of one."""

    file: Path | None = None
    content: bytes = b""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels. Raises :class:`BouquetError` for what cannot be decoded."""
        if self.file is None:
            return self.open().size
        try:
            state = self.file.stat()
        except OSError as error:
            raise self._unreadable(str(error)) from error
        return _size(self, state.st_mtime_ns, state.st_size)

    def open(self) -> "Image":
        """The image, decoded, upright, in RGB. Raises :class:`BouquetError` for what is no image, or too large."""
        reader, upright = pillow()
        try:
            # Pillow warns of sizes that are refused here, and of metadata that nobody reads.
            with warnings.catch_warnings(action="ignore"):
                opened = reader.open(io.BytesIO(self._bytes()), formats=FORMATS)
                self._check_size(*opened.size)
                decoded: Image = upright(opened).convert("RGB")
                return decoded
        except BouquetError:
            raise
        except reader.UnidentifiedImageError as error:
            raise self._unreadable("another format, or none") from error
        except Exception as error:  # a boundary: decoders raise whatever they come upon
            raise self._unreadable(f"{type(error).__name__}: {error}") from error

    def _bytes(self) -> bytes:
        if self.file is None:
            return self.content
        if self.file.stat().st_size > MOST_BYTES:
            raise self._too_large(f"at most {MOST_BYTES:,} bytes", f"{self.file.stat().st_size:,}")
        return self.file.read_bytes()

    def _check_size(self, width: int, height: int) -> None:
        """Raise :class:`BouquetError` for an image that would take too much memory, decoded or scaled."""
        if width * height > MOST_PIXELS:
            raise self._too_large(f"at most {MOST_PIXELS:,} pixels", f"{width:,} x {height:,}")
        if max(width, height) > MOST_RATIO * min(width, height):
            raise self._too_large(f"an aspect ratio of at most {MOST_RATIO}", f"{width:,} x {height:,}")

    def _too_large(self, expected: str, got: str) -> BouquetError:
        return BouquetError(
            "an image is too large", where=self._named, expected=expected, got=got, cure="Scale it, or leave it out."
        )

    def _unreadable(self, reason: str) -> BouquetError:
        expected = f"one of {', '.join(FORMATS)}"
        return BouquetError("an image cannot be read", where=self._named, expected=expected, got=reason)

    @property
    def _named(self) -> str:
        return str(self.file) if self.file is not None else f"{len(self.content):,} bytes in the record"


@lru_cache(maxsize=KEPT)
def _size(image: ImageFile, changed: int, length: int) -> tuple[int, int]:
    """The size of a file's image; when it was ``changed`` and its ``length`` tell it from what it was before."""
    return image.open().size


def images(value: Any, name: str, folder: Path | None) -> list[ImageFile]:
    """The images that the field ``name`` holds, one or a list; ``folder`` is where the data are, None on no disk.

    Raises :class:`LeftOut` where there is none, :class:`BouquetError` for a value that names none, and for a path that
    leaves the folder.
    """
    values = value if isinstance(value, list) else [value]
    if not values or any(each is None or each in ("", b"") for each in values):
        raise LeftOut("image")
    return [_image(each, name, folder) for each in values]


def _image(value: Any, name: str, folder: Path | None) -> ImageFile:
    # As Hugging Face's data sets keep an image: beside its bytes, the name that its file once had.
    stored = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(stored, bytes):
        return ImageFile(content=_bounded(stored, name))
    if not isinstance(stored, str):
        got = "an object without bytes" if isinstance(value, Mapping) else type(value).__name__
        raise _no_image(name, got)
    if stored.startswith("data:"):
        return ImageFile(content=_decoded(stored, name))
    return ImageFile(_within(stored, name, folder))


def _decoded(url: str, name: str) -> bytes:
    header, comma, encoded = url.partition(",")
    try:
        if not comma or not header.endswith(";base64"):
            raise ValueError("invalid base64")
        return _bounded(base64.b64decode(encoded, validate=True), name)
    except ValueError as error:
        raise _no_image(name, f"a data URL that cannot be read ({error})") from error


def _bounded(content: bytes, name: str) -> bytes:
    if len(content) > MOST_BYTES:
        raise BouquetError(
            "an image is too large",
            where=f"field '{name}'",
            expected=f"at most {MOST_BYTES:,} bytes",
            got=f"{len(content):,}",
        )
    return content


def _within(path: str, name: str, folder: Path | None) -> Path:
    """The file that a path means. Raises :class:`BouquetError` unless it is one, within the folder."""
    if folder is None:
        raise _no_image(name, "a path, in data that is not in a folder")
    try:
        root = folder.resolve(strict=True)
        file = (root / path).resolve(strict=True)
        inside = file.is_relative_to(root)
        if inside and file.is_file():
            return file
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_image(name, f"{path[:80]!r} ({type(error).__name__})") from error
    if inside:
        raise _no_image(name, f"{path[:80]!r}, which is not a file")
    raise BouquetError(
        "an image outside the data's folder",
        where=f"field '{name}'",
        expected=f"a path within {folder}",
        got=repr(path[:80]),
        cure="Put images in the folder of the data file, or in folders within it.",
    )


def _no_image(name: str, got: str) -> BouquetError:
    return BouquetError(
        "a field does not hold an image",
        where=f"field '{name}'",
        expected="the path of a file, relative to the data's folder, a data URL, or the bytes of a file",
        got=got,
        cure="Name the field of the images with task.image.",
    )


def made_up(number: int) -> ImageFile:
    """An image of noise, the same one every time for a ``number``."""
    reader, _ = pillow()
    noise = reader.frombytes("RGB", (NOISE, NOISE), random.Random(number).randbytes(3 * NOISE**2))
    noise.save(content := io.BytesIO(), "PNG")
    return ImageFile(content=content.getvalue())


def pillow() -> tuple[Any, Any]:
    """Pillow's ``Image``, and what turns one upright. Raises :class:`BouquetError` where it is not installed."""
    try:
        from PIL import Image, ImageOps  # an optional dependency
    except ImportError as error:
        raise BouquetError(
            "the library that reads images is not installed",
            where="task.name = 'vision'",
            expected="Pillow",
            cure="pip install 'bouquet[vision]', or pip install pillow.",
        ) from error
    return Image, ImageOps.exif_transpose
