"""The command line: subcommands, and ``key=value`` as Flower's flat config, bare words taken as strings."""

import argparse
import re
import tomllib
from collections.abc import Sequence
from typing import Any, TypeAlias

from common.error import BouquetError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parse(settings: Sequence[str]) -> dict[str, Any]:
    """The settings as Flower's flat config. Raises :class:`BouquetError` on one that is not key=value."""
    flat: dict[str, Any] = {}
    for setting in map(quote, settings):
        key, _, value = setting.partition("=")
        try:
            flat[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise BouquetError("a setting cannot be read", expected="key=value", got=setting) from error
    return flat


def quote(setting: str) -> str:
    """A ``key=value`` with the value as TOML: bare words become strings."""
    key, equals, value = setting.partition("=")
    if not equals:
        return setting
    if re.fullmatch(r"true|false|[-+]?[\d.]+(e[-+]?\d+)?|\".*\"", value):
        return setting
    return f'{key}="{value}"'
