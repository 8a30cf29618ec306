"""Methods and registries: hyperparameters are config keys, and what is wrong with them is told."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from common.error import BouquetError
from common.method import AUTO, Method, Registry, given, option


@dataclass(frozen=True, kw_only=True)
class Dye(Method):
    section = "dye"


@dataclass(frozen=True, kw_only=True)
class Indigo(Dye):
    dips: int = option(3, ge=1)
    dark_blue: bool = False
    strength: float = 0.5
    vat: str = "oak"
    helpers: tuple[str, ...] = field(default_factory=tuple)
    water: float = given(1.0)

    name = "indigo"
    paper = "none"


@dataclass(frozen=True, kw_only=True)
class Madder(Dye):
    name = "madder"
    paper = "none"


DYES = Registry[Dye]("dye", Indigo, Madder, default="madder", chooses="A dye.")
OPEN = Registry[Dye]("dye", Indigo, Madder, default=AUTO, chooses="A dye.")


def test_hyperparameters_are_what_a_config_can_carry_and_nothing_else_sets():
    assert Indigo.options() == {"dips": 3, "dark-blue": False, "strength": 0.5, "vat": "oak"}
    assert Madder.options() == {}


def test_the_keys_of_an_axis_are_its_choice_and_its_members_hyperparameters():
    assert DYES.defaults() == {
        "dye.name": "madder",
        "dye.indigo.dips": 3,
        "dye.indigo.dark-blue": False,
        "dye.indigo.strength": 0.5,
        "dye.indigo.vat": "oak",
    }
    assert OPEN.defaults()["dye.name"] == AUTO
    assert (list(DYES), len(DYES), DYES["madder"]) == (["indigo", "madder"], 2, Madder)


def test_a_member_is_built_from_its_own_keys_and_what_it_is_given():
    flat = {"dye.name": "indigo", "dye.indigo.dips": 7, "dye.indigo.strength": 1, "other.name": "x"}
    built = DYES.build(flat, water=2.0)
    assert built == Indigo(dips=7, strength=1.0, water=2.0)
    assert isinstance(built, Indigo)
    assert isinstance(built.strength, float)
    assert DYES.build({}) == Madder()
    assert DYES.build(flat, "madder") == Madder()


def test_a_value_out_of_range_is_told_by_its_key():
    with pytest.raises(BouquetError, match=r"a value out of range \(dye.indigo.dips\): expected 1 or more, got 0"):
        DYES.build({"dye.name": "indigo", "dye.indigo.dips": 0})


@pytest.mark.parametrize(
    ("key", "value", "mistake"),
    [
        ("dye.indigo.dpis", 3, "dye.indigo.dpis: unknown key. Did you mean 'dye.indigo.dips'?"),
        ("dye.madder.dips", 3, "dye.madder.dips: unknown key. Did you mean 'dye.indigo.dips'?"),
        ("dye.indigo.dips", "3", "dye.indigo.dips: expected a whole number, got '3'"),
        ("dye.indigo.dips", 0, "dye.indigo.dips: expected 1 or more, got 0"),
        ("dye.indigo.dips", 3.0, "dye.indigo.dips: expected a whole number, got 3.0"),
        ("dye.indigo.dips", True, "dye.indigo.dips: expected a whole number, got True"),
        ("dye.indigo.dark-blue", 1, "dye.indigo.dark-blue: expected true or false, got 1"),
        ("dye.indigo.strength", "all", "dye.indigo.strength: expected a number, got 'all'"),
        ("dye.indigo.vat", 4, "dye.indigo.vat: expected a string, got 4"),
        ("dye.name", "indgo", "dye.name: expected one of indigo, madder, got 'indgo'. Did you mean 'indigo'?"),
        ("dye.name", AUTO, "dye.name: expected one of indigo, madder, got 'auto'."),
    ],
)
def test_a_mistake_is_told_with_key_and_cure(key: str, value: Any, mistake: str):
    assert [found.rstrip() for found in DYES.mistakes({key: value})] == [mistake]


def test_all_mistakes_are_told_and_other_sections_passed_over():
    flat = {"dye.name": "x", "dye.y": 1, "dye.indigo.dips": "z", "dyes.name": "x", "name": "x"}
    assert len(DYES.mistakes(flat)) == 3
    assert DYES.mistakes({"dye.indigo.strength": 1, "dye.name": "indigo"}) == []
    assert OPEN.mistakes({"dye.name": AUTO}) == []
