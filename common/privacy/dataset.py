"""When two data sets hold the same records, for budgets that are kept per data set.

The digest of a record is coarse on purpose. What makes two records one in it, though they are two, lets them share a
budget; what made one record two would give it a second budget.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from common.error import RefusalError

DIGEST_BYTES = 16

# What a reader of CSV makes None of, and a reader of JSON a text.
EMPTY = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none", "nil"})


@dataclass(frozen=True)
class DataSet:
    """A data set as the budget knows it: a digest (16 bytes) of each different record, and the digest of them all.

    ``fingerprint`` begins with the names of the fields that the records were known by, since only data sets that were
    known by the same fields can be told apart.
    """

    members: frozenset[bytes]
    fingerprint: str

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> "DataSet":
        """The data set of these records, as they were read; two are one where the values of ``fields`` are.

        No value raises, since whether a node answers must not depend on a record. Raises :class:`RefusalError` without
        ``fields``.
        """
        if not fields:
            raise RefusalError("a budget per data set without the fields that identify a record", where="fields")
        names = sorted(set(fields))
        return cls.build(",".join(names), frozenset(_digest(record, names) for record in records))

    @classmethod
    def build(cls, scope: str, members: frozenset[bytes]) -> "DataSet":
        """The data set of these digests, which are of the fields in ``scope``."""
        whole = hashlib.sha256(b"".join([scope.encode(), b"\0", *sorted(members)]))
        return cls(members, f"{scope}:{whole.hexdigest()}")

    @classmethod
    def stored(cls, fingerprint: str, digests: bytes) -> "DataSet":
        """The data set that was kept as :attr:`digests`; if either was changed, its fingerprint is another one."""
        parts = (digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES))
        return cls.build(fingerprint.rpartition(":")[0], frozenset(parts))

    @property
    def digests(self) -> bytes:
        """The digests of all members in one piece."""
        return b"".join(sorted(self.members))

    def apart(self, other: "DataSet") -> bool:
        """Whether no record is in both, for certain."""
        scopes = {dataset.fingerprint.rpartition(":")[0] for dataset in (self, other)}
        return len(scopes) == 1 and self.members.isdisjoint(other.members)


def _digest(record: Mapping[str, Any], names: Iterable[str]) -> bytes:
    # The values without their names: a column that is called otherwise makes no other record.
    values = sorted(filter(None, (canonical(record.get(name)) for name in names)))
    return hashlib.sha256(json.dumps(values).encode()).digest()[:DIGEST_BYTES]


def canonical(value: Any) -> str:
    """One text for all forms of a value that a file format or a spreadsheet might give it; empty for no value."""
    if isinstance(value, Mapping):
        parts = ((canonical(key), canonical(part)) for key, part in value.items())
        return json.dumps(sorted(part for part in parts if part[1])) if value else ""
    if isinstance(value, list | tuple):
        return json.dumps([canonical(part) for part in value]) if value else ""
    if isinstance(value, date):
        return canonical(value.isoformat())
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest() if value else ""
    if not isinstance(value, str | int | float | Decimal | None):
        # Its text may hold where it lies in memory, which is another place each time.
        return f"<{type(value).__name__}>"
    text = unicodedata.normalize("NFKC", str(value)).casefold()
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return "" if text in EMPTY else _number(text) or _moment(text) or text


def _number(text: str) -> str:
    try:
        number = Decimal(text)
        return str(number.normalize() or Decimal(0)) if number.is_finite() else ""
    except (ArithmeticError, ValueError):
        return ""


def _moment(text: str) -> str:
    """A date, with its time where that is not midnight. The time zone goes: some formats do not keep it."""
    try:
        return datetime.fromisoformat(text.upper()).replace(tzinfo=None).isoformat().removesuffix("T00:00:00")
    except ValueError:
        return ""
