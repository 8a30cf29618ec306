"""A site of two nodes, and where a kit is installed for users that may do nothing."""

from pathlib import Path

import pytest

from deploy.command import main
from tests.support.ports import free_port
from tests.support.processes import UNPRIVILEGED


@pytest.fixture
def site(tmp_path) -> Path:
    folder = tmp_path / "hospitals"
    create = ["site", "create", str(folder), "--address", "fl.example.org", "10.0.0.7", "--nodes", "ward-1", "ward-2"]
    assert main([*create, "--state", str(tmp_path / "state"), "--control-port", str(free_port())]) == 0
    return folder


@pytest.fixture
def place(tmp_path) -> list[str]:
    """Where the kit of these tests goes, for users that are there and may do nothing."""
    return ["--user", UNPRIVILEGED, "--keys-user", UNPRIVILEGED, "--installed", str(tmp_path / "etc/ward-1")]
