"""Ranges of config values that more than one section shares."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from common.adapter.limits import HEAVIEST


@dataclass(frozen=True)
class Only:
    """Of a field's type, the values that are ``valid``; ``expected`` is what a mistake says of them."""

    valid: Callable[[Any], bool]
    expected: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if not self.valid(value):
            raise PydanticCustomError("only", "{expected}", {"expected": self.expected})
        return value


Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

LEAST_DELTA, MOST_DELTA = 1e-15, 0.1
LEAST_NOISE, MOST_NOISE = 0.01, 1e6
"""Of a noise multiplier, but for none at all: what an accountant can be asked about."""
LEAST_CLIP, MOST_CLIP = 1e-4, 1e4

Weight = Annotated[float, Field(gt=0, le=HEAVIEST, allow_inf_nan=False)]
Delta = Annotated[float, Field(ge=LEAST_DELTA, le=MOST_DELTA)]
LearningRate = Annotated[float, Field(ge=0, le=10)]


MOST_NAME_BYTES = 200
"""A file system takes 255, of a name with what is put before and after it."""


def _is_file_name(name: str) -> bool:
    # What names a folder on every machine must not lead out of one.
    return bool(re.fullmatch(r"\w[\w.-]{0,99}", name)) and len(name.encode()) <= MOST_NAME_BYTES


def is_node_name(name: str) -> bool:
    """Whether a node may be called so: no name looks like another's, and none like the figure of all nodes."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name)) and name != "all"


FileName = Annotated[
    str,
    Only(
        lambda name: not name or _is_file_name(name),
        "at most 100 letters, digits, dots and hyphens, and 200 bytes of UTF-8, a dot or hyphen not first",
    ),
]
NodeName = Annotated[
    str,
    Only(
        lambda name: not name or is_node_name(name),
        "at most 100 letters a to z, digits, dots and hyphens, a dot or hyphen not first, and not 'all'",
    ),
]
