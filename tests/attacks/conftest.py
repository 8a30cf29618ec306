"""Models that an operator has on the machine, beside the usual one."""

import pytest

from tests.support.architectures import tiny_bert


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random encoder, whose classification head has a bias."""
    return tiny_bert(tmp_path_factory.mktemp("models"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each attack one variant is tried by `make test`, and all of them by `make attack`."""
    seen = set()
    for item in items:
        if "attacks" in item.path.parts:
            attack = (item.path, getattr(item, "originalname", item.name))
            if attack in seen:
                item.add_marker("exhaustive")
            seen.add(attack)
