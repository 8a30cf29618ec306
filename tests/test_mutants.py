"""The mutants keep up with the code that they change; that they are caught is tried by `make mutants`."""

from pathlib import Path

import pytest

from tests.mutants.budget import BUDGET
from tests.mutants.privacy import PRIVACY
from tests.mutants.rules import RULES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", RULES + PRIVACY + BUDGET, ids=lambda mutant: mutant.bug)
def test_a_mutant_applies_to_the_code_as_it_is(mutant):
    compile(mutant.seeded((ROOT / mutant.file).read_text()), mutant.file, "exec")
