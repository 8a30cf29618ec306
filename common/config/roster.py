"""The roster of a site: which name and weight go with each node's key.

Flower gives a key that is registered an id, and a node that uses it has that id in every run. ``bouquet site register``
writes the roster; the coordinator reads it where the environment says, and takes no node's word for its name.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from common.config.ranges import Weight
from common.error import BouquetError

FILE = "nodes.json"
VARIABLE = "BOUQUET_NODES"


class Registered(BaseModel):
    """One node as the site knows it: its name, and its weight where weights are declared."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str
    weight: Weight = 1.0


Roster = Mapping[int, Registered]
"""Registered nodes by Flower's id."""

_ROSTER = TypeAdapter(dict[int, Registered])


def dumped(roster: Roster) -> bytes:
    """A roster as the text of its file."""
    return _ROSTER.dump_json(dict(roster), indent=2) + b"\n"


def of_this_site() -> Roster | None:
    """The roster that the environment names; None where it names none. Raises :class:`BouquetError` on a bad one."""
    if not (named := os.environ.get(VARIABLE)):
        return None
    try:
        return _ROSTER.validate_json(Path(named).read_bytes())
    except (OSError, ValidationError) as error:
        raise BouquetError(
            "the site's nodes cannot be read",
            where=f"{VARIABLE}={named}",
            got=str(error).splitlines()[0],
            cure="Run bouquet site register, and copy the site's coordinator/nodes.json there.",
        ) from error
