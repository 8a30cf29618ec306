"""Flower's SuperExec and task processes, limited to the bundles that this machine allows.

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
from deploy.bundles import bundle, forks
from deploy.flower import APP, PACKAGES, program, replace

EXECUTOR = "flwr.supercore.superexec.executor.subprocess_executor"
OF_EVERY_MESSAGE = ("flwr.supernode.cli.flwr_clientapp", "flwr.clientapp", "flwr.common.serde", "pydantic")
"""What the process of a message imports, apart from its bundle."""


def superexec() -> None:
    """``flower-superexec``, which starts the two task processes below and no other kind; those of nodes are forked."""
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.constant import TaskType

    for module in OF_EVERY_MESSAGE:
        import_module(module)
    pipe, command = forks.part()
    if command:
        sys.argv = command
        clientapp()
        return
    ours = {TaskType.CLIENT_APP: program("bouquet-clientapp"), TaskType.SERVER_APP: program("bouquet-serverapp")}
    replace(EXECUTOR, "TASK_TYPE_TO_COMMAND", lambda _: ours)
    replace(EXECUTOR, "subprocess", lambda module: forks.Forks(pipe, ours[TaskType.CLIENT_APP], module))
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


def _guard(runtime: str) -> None:
    replace(runtime, "install_from_fab", _checked)


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
