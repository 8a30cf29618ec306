"""Flower's programs as this environment has them."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

APP = Path(__file__).parents[1]
PACKAGES = ("common", "strategies", "client_app", "server_app")

# No telemetry, no look for updates, and no second copy of everything installed beside this environment.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
# A SuperExec that asks for a task more often than once a second, where there is one for every message.
OFTEN = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}

# Of a process that simulates nodes: one thread each, as nodes of a deployment have it.
SIMULATION = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def program(name: str) -> str:
    """The path of one of Flower's programs."""
    return str(Path(sys.executable).with_name(name))


@contextmanager
def app_alone() -> Iterator[Path]:
    """A folder of what goes into the bundle alone: Flower reads all that lies beside it, environments too."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "bouquet"
        app.mkdir()
        shutil.copy(APP / "pyproject.toml", app)
        for package in PACKAGES:
            shutil.copytree(APP / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
        yield app


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The current environment for one of Flower's programs, which look for each other on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **QUIET, **OFTEN, **changes, "PATH": path}


def replace(module: str, name: str, change: Callable[[Any], Any]) -> None:
    """Change what one of Flower's modules has; where it has no such thing, nothing starts."""
    place = import_module(module)
    if not hasattr(place, name):
        raise RuntimeError(f"{module} has no {name}: not the Flower that Bouquet was made for")
    setattr(place, name, change(getattr(place, name)))
