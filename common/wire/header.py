"""What a message says of itself: compressed JSON that names what follows.

It is read with suspicion, and nothing is allocated on a claim: an array is bare bytes, and the header's own size is
bounded by the message's.
"""

import math
import zlib
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError

from common.adapter.structures import STRUCTURES
from common.adapter.values import HEAD, OFFSET, Key, Tensors
from common.error import BouquetError, brief
from common.wire import codecs

if TYPE_CHECKING:  # Flower takes seconds to import, and sizes are asked for without it
    from flwr.app import ArrayRecord

FORMAT = 2
FORM = "bytes"
"""What a message's arrays are to Flower."""

MAX_HEADER_BYTES = 16 * 2**20
SMALL_HEADER_BYTES = 2**18
HEADER_SHARE = 4
"""A header may inflate to a small one, and beyond that to so many bytes for each byte of its message."""
MOST_TENSORS = 2**16
COMMAS_A_TENSOR, SPARE_COMMAS = 5, 2**13
"""What a header's text may become in memory is bounded by its values, and those by its commas, before it is read."""

Size = Annotated[int, Field(ge=1, le=2**30)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1000)]


PARTS = OFFSET | HEAD | frozenset().union(*(structure.parts for structure in STRUCTURES.values()))


def _known_part(name: str) -> str:
    if name not in PARTS:
        raise ValueError(f"expected a part, one of {', '.join(sorted(PARTS))}")
    return name


def _known_codec(name: str) -> str:
    if name not in codecs.CODECS:
        raise ValueError(f"expected a codec, one of {', '.join(codecs.CODECS)}")
    return name


Part = Annotated[str, AfterValidator(_known_part)]


class Header(BaseModel):
    """What a message says of itself. ``held`` is the digest of the tensors that the receiver has without it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: int = FORMAT
    kind: Literal["state", "update"]
    rule: Name
    round: Count
    codec: Annotated[str, AfterValidator(_known_codec)]
    scale: Positive
    weight: Positive = 1.0
    node: Name = ""
    held: Name = ""
    rank: Count = 0
    relative: bool = False
    slots: Annotated[list[Count], FailFast()] = []
    tensors: Annotated[
        list[tuple[Name, Part, Annotated[list[Size], Field(max_length=2)]]],
        FailFast(),
    ]

    def numel(self) -> int:
        """How many values the message must hold."""
        return sum(math.prod(shape) for _, _, shape in self.tensors)

    def blank(self) -> Tensors:
        """Its tensors as shapes alone, on torch's meta device."""
        return {Key(layer, part): torch.empty(shape, device="meta") for layer, part, shape in self.tensors}


def read_header(record: "ArrayRecord", most: int = MOST_TENSORS) -> Header:
    """What a record of at most so many tensors says of itself, and nothing of its values.

    Raises :class:`BouquetError`.
    """
    if set(record) - {"mask"} != {"header", "values"}:
        raise BouquetError(
            "a message in an unknown format",
            expected="the arrays header and values, and optionally mask",
            got=", ".join(sorted(record)) or "none",
        )
    inflate = zlib.decompressobj()
    longest = min(MAX_HEADER_BYTES, SMALL_HEADER_BYTES + HEADER_SHARE * payload_bytes(record))
    try:
        text = inflate.decompress(raw(record, "header"), longest)
        if not inflate.eof or inflate.unused_data:
            raise BouquetError("a message header is too long or cut short", expected=f"at most {longest:,} bytes")
        if text.count(b",") > COMMAS_A_TENSOR * most + SPARE_COMMAS:
            raise BouquetError("a message header names too many tensors", expected=f"at most {most:,} tensors")
        return Header.model_validate_json(text)
    except zlib.error as error:
        raise BouquetError("a message header cannot be read", got=str(error)) from error
    except ValidationError as error:
        # Its text holds all mistakes, and each of them what was sent.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = brief(".".join(map(str, first["loc"])))
        raise BouquetError("a message header cannot be read", where=where, got=first["msg"][:200]) from error


def payload_bytes(record: "ArrayRecord") -> int:
    """The bytes of a record's arrays, as they travel."""
    return sum(len(array.data) for array in record.values())


def check_header(header: Header, kind: str, rule: str) -> Header:
    """The header, if it is of this kind and rule. Raises :class:`BouquetError`."""
    for what, expected, got in (
        ("wire format", str(FORMAT), str(header.format)),
        ("kind", kind, header.kind),
        ("rule", rule, header.rule),
    ):
        if expected != got:
            raise BouquetError(
                f"a message of another {what}",
                where=f"node {header.node}" if header.node else "",
                expected=expected,
                got=got,
                cure="Every machine must run the same app with the same run config.",
            )
    if len({(layer, part) for layer, part, _ in header.tensors}) != len(header.tensors):
        raise BouquetError("a message names one tensor twice", where=f"node {header.node}")
    return header


def raw(record: "ArrayRecord", name: str) -> bytes:
    """The bytes of one array; what Flower's own fields say of it is not looked at."""
    if record[name].stype != FORM:
        raise BouquetError("an array in an unknown format", where=name, expected=FORM, got=record[name].stype[:80])
    return record[name].data
