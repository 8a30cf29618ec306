"""`kit.toml`: what a machine has to know of its kit to install it and to be checked."""

import tomllib
from pathlib import Path
from typing import Self

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from common.error import BouquetError

FILE = "kit.toml"


class KitFacts(BaseModel):
    """Where a kit goes, whose it is, and, of a node, where the SuperLink is.

    ``user`` runs the code of runs and owns the folders of ``state``; ``keys_user``, of a node, holds its key and owns
    ``keys_state``.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    installed: str
    user: str
    state: list[str]
    keys_user: str = ""
    keys_state: str = ""
    superlink: str = ""
    port: int = 0

    @classmethod
    def read(cls, kit: Path) -> Self:
        """The facts of an unpacked kit. Raises :class:`BouquetError` where they cannot be read."""
        try:
            return cls.model_validate(tomllib.loads((kit / FILE).read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise BouquetError(
                "a kit cannot be read",
                where=str(kit / FILE),
                got=str(error).splitlines()[0],
                cure="Name the folder of an unpacked kit of this release.",
            ) from error

    @property
    def is_node(self) -> bool:
        """Whether it is a node's kit, and not the coordinator's."""
        return bool(self.superlink)

    def write(self, kit: Path) -> None:
        """Put them into a kit."""
        (kit / FILE).write_text(tomli_w.dumps(self.model_dump()))
