"""What an error says, and what of it may leave a node."""

import ast

import pytest

from common.config.section import ConfigError
from common.error import BouquetError
from tests.support import ROOT

# Whatever raises while a record is at hand.
NEAR_RECORDS = [
    "common/sources/records.py",
    "common/sources/dealing.py",
    "common/sources/files.py",
    "common/sources/stable.py",
    "common/sources/fields.py",
    "common/privacy/dataset.py",
    "client_app/units.py",
    "client_app/scoring.py",
    *(str(file.relative_to(ROOT)) for file in (ROOT / "common/tasks").glob("*.py")),
]


def test_an_error_says_what_where_expected_got_and_what_to_do():
    error = BouquetError("a label is out of range", where="field 'x'", expected="0 or 1", got="7", cure="Mend it.")
    assert str(error) == "a label is out of range (field 'x'): expected 0 or 1, got 7. Mend it."
    assert error.what == "a label is out of range"


def test_a_config_with_mistakes_does_not_carry_them_in_what_travels():
    assert ConfigError(["data: got '/secret'"], "node config", "Correct them.").what == "a config with mistakes"


@pytest.mark.parametrize("module", NEAR_RECORDS)
def test_what_travels_of_an_error_near_records_is_a_fixed_sentence(module):
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / module).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error")
    ]
    loose = [ast.unparse(call)[:80] for call in calls if call.args and not isinstance(call.args[0], ast.Constant)]
    assert loose == []
