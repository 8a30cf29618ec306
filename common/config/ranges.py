"""What the values of a config may be, where more than one section has such values."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from common.adapter.limits import HEAVIEST

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


def _file_name(name: str) -> str:
    # What names a folder on every machine must not lead out of one.
    if name and not (re.fullmatch(r"\w[\w.-]{0,99}", name) and len(name.encode()) <= MOST_NAME_BYTES):
        raise PydanticCustomError(
            "file_name",
            "at most 100 letters, digits, dots and hyphens, and 200 bytes of UTF-8, a dot or hyphen not first",
        )
    return name


def is_node_name(name: str) -> bool:
    """Whether a node may be called so: no name looks like another's, and none like the figure of all nodes."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name)) and name != "all"


def _node_name(name: str) -> str:
    if name and not is_node_name(name):
        raise PydanticCustomError(
            "node_name",
            "at most 100 letters a to z, digits, dots and hyphens, a dot or hyphen not first, and not 'all'",
        )
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
NodeName = Annotated[str, AfterValidator(_node_name)]
