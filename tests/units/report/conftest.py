"""Run directories of a plain and of a private run, and one that a test may spoil."""

import shutil
from pathlib import Path

import pytest

from tests.support import recorded


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return recorded.plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def private(tmp_path_factory):
    return recorded.private(tmp_path_factory.mktemp("private"))


@pytest.fixture
def copy(plain, tmp_path):
    """A run directory that a test may spoil."""
    return Path(shutil.copytree(plain, tmp_path / "plain"))
