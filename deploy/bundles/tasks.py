"""Flower's SuperExec and task processes, held to the bundles that this machine allows.

Flower 1.39 asks nobody before it imports a bundle, so the processes that do it are started through these: installed
code, which reads the bundle as bytes and decides before any of it is unpacked.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from common.stamp import utc_now
from deploy.bundles import bundle
from deploy.flower import APP, PACKAGES, program


def superexec() -> None:
    """``flower-superexec``, which starts the two task processes below and no other kind."""
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.constant import TaskType

    ours = {TaskType.CLIENT_APP: program("bouquet-clientapp"), TaskType.SERVER_APP: program("bouquet-serverapp")}
    _replace("flwr.supercore.superexec.executor.subprocess_executor", "TASK_TYPE_TO_COMMAND", lambda _: ours)
    flower_superexec()


def clientapp() -> None:
    """``flwr-clientapp`` for an allowed bundle."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    _guard("flwr.supernode.runtime.run_clientapp")
    flwr_clientapp()


def serverapp() -> None:
    """``flwr-serverapp`` for an allowed bundle."""
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    _guard("flwr.superlink.runtime.run_serverapp")
    flwr_serverapp()


def _replace(module: str, name: str, change: Callable[[Any], Any]) -> None:
    """Change what one of Flower's modules has; where it has no such thing, nothing starts."""
    place = import_module(module)
    if not hasattr(place, name):
        raise RuntimeError(f"{module} has no {name}: another Flower than Bouquet was made for")
    setattr(place, name, change(getattr(place, name)))


def _guard(runtime: str) -> None:
    _replace(runtime, "install_from_fab", _checked)


def _checked(install: Callable[..., Path]) -> Callable[..., Path]:
    """Flower's installation of a bundle, after this machine's consent, with a line in the log that says which it is."""

    def checked(content: bytes, *arguments: Any, **options: Any) -> Path:
        found = bundle.check(content)
        print(json.dumps({"bundle": found, "time": utc_now()}), flush=True)
        _forget()
        return install(content, *arguments, **options)

    return checked


def _forget() -> None:
    """Put aside what was imported to decide: the bundle brings its own packages, under the same names."""
    installed = [name for name in sys.modules if name.partition(".")[0] in (*PACKAGES, "deploy")]
    for name in installed:
        del sys.modules[name]
    sys.path[:] = [place for place in sys.path if place != str(APP)]
