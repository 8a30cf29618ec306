"""The run config as it is written on a command line: ``key=value``, and TOML files of such keys."""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from common.config.renamed import RENAMED, renamed, told
from common.config.section import flatten
from common.error import BouquetError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

SHIPPED = ("embedded", "stdlib")


def add_command(commands: Commands, name: str, *, help: str, example: str) -> argparse.ArgumentParser:
    """A subcommand whose ``--help`` shows ``example`` line by line as it stands."""
    return commands.add_parser(
        name, help=help, description=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def read(settings: Sequence[str]) -> dict[str, Any]:
    """Flower's flat run config; a later setting wins. A bare word is a string, and an old key is told.

    Raises :class:`BouquetError` on what is neither ``key=value`` nor a TOML file.
    """
    flat: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals and setting.endswith(".toml"):
            flat |= _file(setting)
        elif not (equals and key):
            raise BouquetError("a setting cannot be read", expected="key=value, or a .toml file", got=setting)
        else:
            flat[key] = _value(value)
    for old in sorted(RENAMED.keys() & flat):
        print(f"{told(old)} The old name is read for two minor versions.", file=sys.stderr)
    return renamed(flat)


def located(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same with files and folders of this machine by their absolute paths, which is what an app can find."""

    def absolute(value: Any) -> Any:
        place = Path(str(value)).expanduser()
        return str(place.resolve()) if value and value not in SHIPPED and place.exists() else value

    return {key: absolute(value) if is_place(key) else value for key, value in flat.items()}


def is_place(key: str) -> bool:
    """Whether a setting names a file or folder, or something else by one's name."""
    return key in ("model.name", "model.adapter") or key.endswith(".source")


def write(flat: Mapping[str, Any]) -> list[str]:
    """The same as ``key=value`` with the value as TOML, which is what Flower reads."""
    return [f"{key}={json.dumps(value)}" for key, value in flat.items()]


def _file(name: str) -> dict[str, Any]:
    try:
        return dict(flatten(tomllib.loads(Path(name).read_text(encoding="utf-8"))))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BouquetError("a settings file cannot be read", where=name, got=str(error)) from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
