"""Models that an operator has on the machine, beside the usual one."""

import pytest

from tests.conftest import tiny_bert


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random encoder, whose classification head has a bias."""
    return tiny_bert(tmp_path_factory.mktemp("models"))
