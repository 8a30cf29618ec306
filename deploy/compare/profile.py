"""A profile: what a comparison varies, as a TOML file."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.config.ranges import Count, CountOrOff
from common.config.section import ConfigError, Section, flatten, validate
from common.error import BouquetError, did_you_mean
from strategies import RULES, Recipe

FOLDER = Path(__file__).parents[2] / "profiles"
BASELINES = ("local", "centralised")

Settings = Mapping[str, Any]
"""A piece of run config, nested or dotted as TOML has it."""


class Profile(Section):
    """One comparison. Each table names settings that are laid over ``config``, and all tables are crossed.

    ``rules`` are run under their names unless they set ``rule.name`` themselves; ``baselines`` may set what ``local``
    and ``centralised`` training need of their own; ``quick`` is laid over everything in a quick look. ``quality`` is
    what the rules are judged by: the ``nodes``' held-out examples, or ``central``, those of ``evaluation.source``.
    """

    about: str = ""
    nodes: Annotated[int, Field(ge=2)] = 4
    quality: Literal["nodes", "central"] = "nodes"
    seeds: list[CountOrOff] = Field(default=[0, 1, 2], min_length=1)
    ranks: list[Count] = Field(default=[8], min_length=1)
    config: Settings = Field(default={})
    rules: Mapping[str, Settings] = Field(default={})
    partitions: Mapping[str, Settings] = Field(default={"as configured": {}}, min_length=1)
    privacy: Mapping[str, Settings] = Field(default={"none": {}}, min_length=1)
    baselines: Mapping[Literal["local", "centralised"], Settings] = Field(default={})
    quick: Settings = Field(default={})

    def base(self, over: Settings) -> dict[str, Any]:
        """The run config that all cells share, flat, with the command line's own settings over it."""
        return dict(flatten(self.config)) | dict(over)

    def rule(self, label: str) -> dict[str, Any]:
        """The settings of one of ``rules``, flat."""
        return {"rule.name": label} | dict(flatten(self.rules[label]))


def find(name: str) -> Path:
    """The file of a profile: a path, or the name of one in ``profiles/``. Raises :class:`BouquetError`."""
    path = Path(name).expanduser()
    if path.suffix == ".toml" or len(path.parts) > 1:
        if path.is_file():
            return path
        raise BouquetError(
            "there is no such profile", got=str(path), cure=f"Profiles that ship with Bouquet: {_known()}."
        )
    if (path := FOLDER / f"{name}.toml").is_file():
        return path
    raise BouquetError(
        "there is no profile with this name",
        where=str(FOLDER),
        expected=f"one of {_known()}, or a path",
        got=f"'{name}'",
        cure=did_you_mean(name, _names()),
    )


def read(path: Path, over: Settings) -> Profile:
    """Read a profile, with ``over`` laid over its ``config``. Raises :class:`ConfigError` with every mistake in it."""
    where, cure = f"profile {path}", "docs/comparing.md says how a profile is written."
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BouquetError("a profile cannot be read", where=str(path), got=str(error)) from error
    profile = validate(Profile, tables, [], where, cure)
    if mistakes := list(_mistakes(profile, over)):
        raise ConfigError(mistakes, where, cure)
    return profile


def _mistakes(profile: Profile, over: Settings) -> Iterator[str]:
    """What the run configs of the cells would be refused for, by the table that it stands in."""
    if not profile.rules:
        yield "rules: expected at least one, such as [rules] fedit = {}"
    for name in ("seeds", "ranks"):
        values = getattr(profile, name)
        if len(set(values)) < len(values):
            yield f"{name}: expected each value once, got {values}"
    base = profile.base(over)
    if own := sorted({"seed", "run-name", "run-directory", "resume", "min-nodes"} & base.keys()):
        yield f"config: {', '.join(own)} cannot be set here: the comparison sets it for every run (seeds, --output)"
    if "data.source" not in base:
        yield "config: data.source is missing. Set it, or name the data with --data"
    if profile.quality == "central" and not base.get("evaluation.source"):
        yield "config: evaluation.source is missing, which quality = 'central' needs"
    wrong = set(_refused(base))
    yield from (f"config: {mistake}" for mistake in sorted(wrong))
    tables = {f"rules.{label}": profile.rule(label) for label in profile.rules}
    tables |= {f"partitions.{label}": dict(flatten(settings)) for label, settings in profile.partitions.items()}
    tables |= {f"privacy.{label}": dict(flatten(settings)) for label, settings in profile.privacy.items()}
    tables |= {f"baselines.{label}": dict(flatten(settings)) for label, settings in profile.baselines.items()}
    tables["quick"] = dict(flatten(profile.quick))
    for label, settings in tables.items():
        yield from (f"{label}: {mistake}" for mistake in _refused(base | settings) if mistake not in wrong)
    if profile.quality == "central" and (personal := _personal(profile)):
        yield f"rules: {', '.join(personal)} cannot be scored centrally. Use quality = 'nodes', or leave them out"


def _refused(flat: Settings) -> list[str]:
    try:
        Recipe.read(flat)
    except ConfigError as error:
        return error.mistakes
    except BouquetError as error:
        return [str(error)]
    return []


def _personal(profile: Profile) -> list[str]:
    names = {label: str(profile.rule(label)["rule.name"]) for label in profile.rules}
    return [label for label, name in names.items() if name in RULES and RULES[name].keeps != "nothing"]


def _names() -> list[str]:
    """The comparisons among the files of ``profiles/``, which may hold run configs too."""
    return sorted(path.stem for path in FOLDER.glob("*.toml") if re.search(r"^\[rules", path.read_text(), re.MULTILINE))


def _known() -> str:
    return ", ".join(_names())
