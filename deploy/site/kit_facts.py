"""`kit.toml`: what a machine must know about its kit, to install and check it."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.error import BouquetError

FILE = "kit.toml"


Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
User = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
Folder = Annotated[str, Field(pattern=r"^(/[.]?[A-Za-z0-9_-][A-Za-z0-9._-]*)+$")]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]-]+$")]


class KitFacts(BaseModel):
    """Where a kit goes, whose it is, and, of a node, where the SuperLink is.

    ``user`` runs the code of runs and owns ``state`` and ``witness``; ``keys_user``, of a node, holds its key and owns
    ``keys_state``. A node has them from somebody else and makes root's scripts and units of them: they are names, plain
    absolute paths and an address, and nothing more.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    site: Name
    name: Name
    installed: Folder
    programs: Folder
    user: User
    state: Folder
    witness: Folder | Literal[""] = ""
    keys_user: User | Literal[""] = ""
    keys_state: Folder | Literal[""] = ""
    superlink: Address | Literal[""] = ""
    port: Annotated[int, Field(ge=0, le=65533)] = 0

    @property
    def folders(self) -> list[tuple[str, str]]:
        """The folders that belong to a user, and whose."""
        found = [(self.state, self.user), (self.witness, self.user), (self.keys_state, self.keys_user)]
        return [(folder, user) for folder, user in found if folder]

    @classmethod
    def read(cls, kit: Path) -> Self:
        """The facts of an unpacked kit. Raises :class:`BouquetError` where they cannot be read."""
        try:
            return cls.model_validate(tomllib.loads((kit / FILE).read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise BouquetError(
                "a kit cannot be read",
                where=str(kit / FILE),
                got=" ".join(str(error).split()),
                cure="Name the folder of an unpacked kit of this release.",
            ) from error

    @property
    def is_node(self) -> bool:
        """Whether it is a node's kit, and not the coordinator's."""
        return bool(self.superlink)

    def write(self, kit: Path) -> None:
        """Put them into a kit."""
        (kit / FILE).write_text(tomli_w.dumps(self.model_dump()))
