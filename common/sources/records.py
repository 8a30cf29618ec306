"""The one reader of local files: every record by itself, with where it stands.

A private run promises that nobody can tell two data sets apart of which one has one record more. So nothing here infers
a type from other records or decides about one record by another: bytes that are not UTF-8 are read as Windows-1252 one
by one, the delimiter of a table is its header's, and a record that is broken is one broken record. What becomes of that
is the reader's to say: a plain run stops, in a private one it is absent.

In a table a record is what the file's quotation marks make of it; JSON lines are the form in which one broken line is
one broken record. An empty cell is no value; no word, such as NA, is one.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from common.error import BouquetError, did_you_mean
from common.sources.fields import words

Record = Mapping[str, Any]
Found = tuple[str, Record | BouquetError]
"""What stands somewhere in a file: where, in the words that follow the file's name, and a record or what is wrong."""


class Placed(NamedTuple):
    """A record, or what is wrong with it, and where it stands."""

    where: str
    found: Record | BouquetError


SHOWN = 3
"""Of the faults in a data set, how many are told in full."""


def content(placed: Placed) -> Record:
    """The record at a place. Raises what is wrong with it, where something is."""
    if isinstance(placed.found, BouquetError):
        raise placed.found
    return placed.found


def fields(found: Iterable[Placed]) -> list[str]:
    """The fields that any of the records has, in the order in which they come."""
    return list(dict.fromkeys(name for placed in found for name in content(placed)))


def told(faults: Sequence[str], records: int) -> str:
    """The first of the faults of so many records, in full."""
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return f"{len(faults)} of {records}: {'; '.join(faults[:SHOWN])}{more}"


def broken(faults: Sequence[Placed], records: int, where: str) -> BouquetError:
    """The error for the faults of so many records: those that come first, and what to do about the first."""
    # Records are dealt out in any order; of two places in one file the shorter, and then the lesser, comes first.
    by_place = sorted(faults, key=lambda fault: (len(fault.where), fault.where))
    errors = [(fault.where, fault.found) for fault in by_place if isinstance(fault.found, BouquetError)]
    cure = errors[0][1].cure or "Correct them, or name other fields with the task.* keys of the run."
    said = [f"{place}: {error.wrong}" for place, error in errors]
    return BouquetError("records that cannot be used", where=where, got=told(said, records), cure=cure)


def values(found: Sequence[Placed], name: str) -> list[str]:
    """What every record says in the partition field. Raises :class:`BouquetError` with those that say nothing."""
    if not any(name in record for record in map(content, found)):
        columns = fields(found)
        raise BouquetError(
            "the data has no such field",
            where="data.partition-field",
            expected=f"one of {', '.join(columns)}",
            got=f"'{name}'",
            cure=f"{did_you_mean(name, columns)} Or set data.partition = 'iid'.".strip(),
        )
    said = [words(content(placed).get(name), name) for placed in found]
    if empty := [placed.where for placed, value in zip(found, said, strict=True) if not value]:
        raise BouquetError(
            "records without a value in the partition field",
            where=f"data.partition-field = '{name}'",
            expected="a value in each record, which says whose it is",
            got=told(empty, len(found)),
            cure="Correct them, name another field, or set data.partition = 'iid'.",
        )
    return said


def form(file: Path) -> str:
    """The ending that says how a file is read, but for that of its compression; empty where nothing here reads it."""
    ending = (Path(file.stem).suffix if file.suffix in PACKED else file.suffix).lower()
    return ending if ending in FORMS else ""


def read(file: Path) -> Iterator[Placed]:
    """Every record of a file of a known :func:`form`; where the file breaks off, what came before has been read."""
    try:
        with _opened(file) as opened:
            for place, found in FORMS[form(file)](opened, _delimiter_of(file)):
                yield Placed(f"{file}{place}", found)
    except (OSError, EOFError, zlib.error) as error:
        yield Placed(str(file), BouquetError("a data file cannot be read to its end", got=str(error)))


def _opened(file: Path) -> io.BufferedReader:
    if file.suffix == ".zst":
        import pyarrow  # which takes a moment to import; the standard library reads the form from Python 3.14 on

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return io.BufferedReader(gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _delimiter_of(file: Path) -> str:
    return "\t" if form(file) == ".tsv" else ""


def _windows(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


codecs.register_error("windows", _windows)


def _lines(opened: io.BufferedReader) -> Iterator[str]:
    """The lines of a text; a byte order mark is no part of any."""
    return (line.decode(errors="windows").removeprefix("\ufeff") for line in opened)


def _json_lines(opened: io.BufferedReader, _: str) -> Iterator[Found]:
    return _objects(_lines(opened))


def _objects(lines: Iterable[str]) -> Iterator[Found]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f":{number}", _object(line)


def _json(opened: io.BufferedReader, _: str) -> Iterator[Found]:
    """The objects of one JSON array, one object alone, or JSON lines under another name."""
    content = _whole(opened)
    try:
        values = json.loads(content, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith("["):
            yield "", BouquetError("a file is not JSON", expected="an array of objects", got=str(error))
            return
        values = None
    if values is None:
        yield from _objects(content.split("\n"))
    else:
        for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
            yield f", record {number}", _usable(value)


def _whole(opened: io.BufferedReader) -> str:
    """A whole text, in UTF-16 where it says so in its first bytes."""
    content = opened.read()
    if content.startswith(UTF_16):
        return content.decode("utf-16", errors="replace")
    return content.decode(errors="windows").removeprefix("\ufeff")


def _table(opened: io.BufferedReader, delimiter: str) -> Iterator[Found]:
    csv.field_size_limit(2**31 - 1)  # a long field would end the reading of all that follow
    # A table's first line is its header and so no record, which is why it may speak for the others.
    wide = opened.peek(2)[:2] in UTF_16
    lines = iter(io.StringIO(_whole(opened), newline="")) if wide else _lines(opened)
    first = next(lines, "")
    # Strict, so that a quotation mark that nothing closes is an error, and does not swallow what follows.
    rows = csv.reader(chain([first], lines), delimiter=delimiter or _delimiter(first), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        yield "", BouquetError("the header of a table cannot be read", got=str(error), cure="Save it as CSV in UTF-8.")
        return
    if twice := sorted({name for name in header if header.count(name) > 1}):
        yield "", BouquetError("two columns with the same name", got=", ".join(twice), cure="Give each its own name.")
        return
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f":{rows.line_num}", BouquetError("a row is not CSV", got=str(error))
            continue
        if row:
            yield f":{rows.line_num}", _cells(header, row)


def _delimiter(header: str) -> str:
    """What stands between the names of a header most often, outside quotation marks."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(",;\t|", key=bare.count)


def _cells(header: list[str], row: list[str]) -> Record | BouquetError:
    if len(row) > len(header):
        return BouquetError(
            "a row has more cells than the header",
            expected=f"{len(header)} ({', '.join(header)})",
            got=str(len(row)),
            cure="Quote text that contains the delimiter.",
        )
    return dict.fromkeys(header) | {name: cell or None for name, cell in zip(header, row, strict=False)}


def _texts(opened: io.BufferedReader, _: str) -> Iterator[Found]:
    for number, line in enumerate(_lines(opened), start=1):
        if "\0" in line:
            yield (
                f":{number}",
                BouquetError(
                    "a line is not text",
                    expected="UTF-8",
                    got="zero bytes, as UTF-16 has",
                    cure="Save the file in UTF-8.",
                ),
            )
        elif line.strip():
            yield f":{number}", {"text": line.rstrip("\r\n")}


def _parquet(opened: io.BufferedReader, _: str) -> Iterator[Found]:
    import pyarrow  # see above
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(io.BytesIO(opened.read())).iter_batches()
    except pyarrow.ArrowException as error:
        yield "", BouquetError("a file is not Parquet", got=str(error))
        return
    rows = (batch.slice(row, 1) for batch in batches for row in range(len(batch)))
    for number, row in enumerate(rows, start=1):
        try:
            yield f", record {number}", row.to_pylist()[0]
        except Exception as error:  # a value that Python has no form for
            yield f", record {number}", BouquetError("a record cannot be decoded", got=str(error))


def _object(line: str) -> Record | BouquetError:
    try:
        value = json.loads(line, parse_int=_whole_number)
    except (ValueError, RecursionError):
        cure = "A UTF-16 file must be saved as UTF-8." if "\0" in line else ""
        return BouquetError("a line is not JSON", expected="one JSON object per line", got=line.strip()[:80], cure=cure)
    return _usable(value)


def _whole_number(digits: str) -> int | str:
    """A number, or its digits where Python reads no more of them, which would end the reading of what is around it."""
    return int(digits) if len(digits) <= 1000 else digits


def _usable(value: Any) -> Record | BouquetError:
    """An object; not one that is nested so deeply that whatever reads it again may fail."""
    if not isinstance(value, dict):
        return BouquetError("a record is not an object", expected="one JSON object per record", got=repr(value)[:80])
    if not _shallow(value):
        return BouquetError("a record is nested too deeply", expected=f"at most {DEEPEST} levels", got="more")
    return value


DEEPEST = 50


def _shallow(value: Any, levels: int = DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(each, levels - 1) for each in inner)


UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PACKED = (".gz", ".zst")
Form = Callable[[io.BufferedReader, str], Iterator[Found]]
FORMS: Mapping[str, Form] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _texts,
    ".parquet": _parquet,
}
