"""Flower's programs as this environment has them."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# No telemetry, no look for updates, and no second copy of everything installed beside this environment.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def program(name: str) -> str:
    """The path of one of Flower's programs."""
    return str(Path(sys.executable).with_name(name))


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The current environment for one of Flower's programs, which look for each other on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **QUIET, **changes, "PATH": path}
