"""Which files make up a data source, and whether they have changed."""

from collections.abc import Iterable
from pathlib import Path

from common.error import BouquetError
from common.sources.records import FORMS, form

Stamp = tuple[tuple[str, int, int, int], ...]


def stamp(source: str, setting: str = "data.source") -> Stamp:
    """What tells the files of a source from what they were before; nothing for what is no path."""
    return stamp_of(files(source, setting) or ())


def stamp_of(found: Iterable[Path]) -> Stamp:
    """What tells files from what they were before. Raises :class:`OSError` where one is missing."""
    facts = [(str(file), file.stat()) for file in found]
    return tuple((name, fact.st_mtime_ns, fact.st_size, fact.st_ino) for name, fact in facts)


def files(source: str, setting: str = "data.source") -> list[Path] | None:
    """The files of a source, all of one form; None for what is no path.

    Raises :class:`BouquetError`, by the name of the ``setting`` that the source is from.
    """
    path = Path(source).expanduser()
    if source == "stdlib":
        return None
    if path.exists():
        found = [path] if path.is_file() else sorted(file for file in path.iterdir() if form(file))
        if not found or not all(map(form, found)):
            raise BouquetError(
                "no file in a known format",
                where=str(path),
                expected=f"{', '.join(FORMS)} (or .gz or .zst of one)",
                got=path.name,
            )
        if len(kinds := sorted({form(file) for file in found})) > 1:
            raise BouquetError(
                "files of several formats in one folder",
                where=str(path),
                got=", ".join(kinds),
                cure="Name one file, or keep only files of one format in the folder.",
            )
        return found
    if path.is_absolute() or source.startswith((".", "~")) or form(path):
        raise BouquetError(
            "there is no such file or folder",
            where=setting,
            got=source,
            cure="Use an absolute path: an app does not run in the folder it was started from.",
        )
    return None
