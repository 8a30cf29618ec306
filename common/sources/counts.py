"""What becomes of a node's records on their way to examples: counted, so that nothing is left out in silence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from common.error import BouquetError
from common.sources.fields import REASONS

MOST = 10**12
LEFT_OUT = "left-out-"


@dataclass(frozen=True)
class Counts:
    """How many ``records`` were read, were left out by reason and are cut at ``length`` tokens; and their examples."""

    records: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0
    examples: int = 0
    length: int = 0

    def __str__(self) -> str:
        """The counts in a line; what is not the case is not said."""
        said = f"{self.records:,} record{'' if self.records == 1 else 's'}"
        if out := sum(self.left_out.values()):
            said += f", {out:,} left out ({self.reasons})"
        return said + (f", {self.cut:,} cut at {self.length:,} tokens" if self.cut else "")

    @property
    def reasons(self) -> str:
        """How many are left out for each reason, in words."""
        return ", ".join(f"{self.left_out[why]:,} {said}" for why, said in REASONS.items() if self.left_out.get(why))

    def numbers(self) -> dict[str, int]:
        """The counts by name, as they travel."""
        out = {f"{LEFT_OUT}{why}": self.left_out.get(why, 0) for why in REASONS}
        return {name: getattr(self, name) for name in ("records", "cut", "examples", "length")} | out

    @classmethod
    def read(cls, numbers: Mapping[str, object]) -> Self:
        """The counts of another machine. Raises :class:`BouquetError` on what could be none."""
        known = set(cls().numbers())
        whole = {name: value for name, value in numbers.items() if isinstance(value, int) and 0 <= value <= MOST}
        left_out = {why: number for why in REASONS if (number := whole.get(f"{LEFT_OUT}{why}", 0))}
        records = whole.get("records", 0)
        if set(whole) != known or set(numbers) != known or sum(left_out.values()) + whole["cut"] > records:
            raise BouquetError(
                "malformed counts of a data set",
                expected=f"consistent whole numbers from 0: {', '.join(sorted(known))}",
                got=f"{len(numbers)} others",
            )
        return cls(records, left_out, whole["cut"], whole["examples"], whole["length"])
