"""The mutants keep up with the code that they change; that they are caught is tried by `make mutants`."""

import pytest

from tests.mutants.__main__ import MUTANTS
from tests.support import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_mutant_applies_to_the_code_as_it_is(mutant):
    compile(mutant.seeded((ROOT / mutant.file).read_text()), mutant.file, "exec")
