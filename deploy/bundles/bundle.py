"""An app bundle (FAB) by its digest, and the file of those that this machine allows.

The digest is of the files in a bundle, by name and content: two machines whose compression differs build one bundle.
"""

import hashlib
import json
import os
import re
import zipfile
from io import BytesIO
from pathlib import Path

from common.error import BouquetError
from deploy.flower import app_alone

VARIABLE = "BOUQUET_BUNDLES"
FILE = "bundles.txt"
LARGEST = 64 * 2**20
"""Bytes of a bundle's files, unpacked: Flower itself allows 10 MB, packed."""


def digest(content: bytes) -> str:
    """SHA-256 over the names and contents of a bundle's files, in hex.

    Raises :class:`BouquetError` on what is no bundle, names a file twice, or unpacks to more than :data:`LARGEST`.
    """
    files: dict[str, str] = {}
    left = LARGEST
    try:
        with zipfile.ZipFile(BytesIO(content)) as bundle:
            for entry in bundle.infolist():
                if entry.filename in files:
                    raise BouquetError("a bundle with two files of the same name", where=repr(entry.filename))
                with bundle.open(entry) as file:
                    unpacked = file.read(left + 1)
                if len(unpacked) > left:
                    raise BouquetError("a bundle that is too large", expected=f"at most {LARGEST} bytes unpacked")
                left -= len(unpacked)
                files[entry.filename] = hashlib.sha256(unpacked).hexdigest()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise BouquetError("a bundle cannot be read", expected="a Flower app bundle", got=str(error)) from error
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def of_app(app: Path) -> str:
    """The digest of the bundle that ``flwr run`` makes of an app's folder."""
    from flwr.cli.build import build_fab_from_disk  # Flower takes a second to import

    return digest(build_fab_from_disk(app))


def of_this_release() -> str:
    """The digest of the bundle of the release that is installed here."""
    with app_alone() as app:
        return of_app(app)


def allowed(file: Path) -> frozenset[str]:
    """The digests in a file of allowed bundles: one a line, and what it is behind a #.

    Raises :class:`BouquetError` where it cannot be read or a line is no digest.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BouquetError(
            "the allowed bundles cannot be read",
            where=str(file),
            got=str(error),
            cure="bouquet bundle writes the one of the release installed here.",
        ) from error
    found = set[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.partition("#")[0].strip()
        if name and not re.fullmatch(r"[0-9a-f]{64}", name):
            raise BouquetError(
                "a line that is not a digest", where=f"{file}, line {number}", expected="64 hex digits", got=repr(name)
            )
        if name:
            found.add(name)
    return frozenset(found)


def check(content: bytes) -> str:
    """The digest of a bundle that this machine allows. Raises :class:`BouquetError` on any other."""
    named = os.environ.get(VARIABLE, "")
    if not named:
        raise BouquetError("no bundle is allowed here", where=VARIABLE, expected="the file of allowed bundles")
    found = digest(content)
    if found not in allowed(Path(named)):
        raise BouquetError(
            "a bundle that is not allowed here",
            where=named,
            got=found,
            cure="The coordinator runs another release than this machine, or other code. Whoever is responsible for "
            "this machine decides whether to add the digest.",
        )
    return found
