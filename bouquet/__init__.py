"""Bouquet: federated LoRA fine-tuning of language models on Flower.

``from bouquet import FFALoraStrategy, RULES`` and the other names of :data:`NAMES` are the public API.

Installed, Bouquet's packages lie in ``bouquet/app``, where no other package called ``common`` meets them; in a checkout
they lie beside this one. Either way importing ``bouquet`` puts them first on the path.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
APP = _HERE / "app" if (_HERE / "app").is_dir() else _HERE.parent
sys.path.insert(0, str(APP))

NAMES = {
    "RULES": "strategies",
    "AXES": "strategies",
    "Rule": "strategies",
    "Recipe": "strategies",
    "read_config": "strategies",
    "LoraStrategy": "strategies",
    "Method": "common.method",
    "Registry": "common.method",
    "Spec": "common.adapter.spec",
    "State": "common.adapter.values",
    "Update": "common.adapter.values",
    "BouquetError": "common.error",
    "patch": "client_app.trainer",
}
"""The public names and where they are at home; each is imported when it is asked for.

Beside them there is a strategy for every rule: ``FFALoraStrategy``.
"""
__all__ = list(NAMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("bouquet")
    home = "strategies" if name.endswith("Strategy") else NAMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bouquet' has no attribute '{name}'")
    return getattr(import_module(home), name)


def main() -> int:
    """The ``bouquet`` command."""
    try:
        from deploy.command import main as command

        return command()
    except KeyboardInterrupt:  # before the command could take care of it
        print("bouquet: interrupted", file=sys.stderr)
        return 130


def supernode() -> None:
    """The ``bouquet-supernode`` command, which a node's scripts start."""
    from deploy.supernode import start

    start()


def superexec() -> None:
    """The ``bouquet-superexec`` command, which a site's scripts start."""
    from deploy.bundles import tasks

    tasks.superexec()


def clientapp() -> None:
    """The ``bouquet-clientapp`` command, which the SuperExec of a node starts."""
    from deploy.bundles import tasks

    tasks.clientapp()


def serverapp() -> None:
    """The ``bouquet-serverapp`` command, which the SuperExec of a coordinator starts."""
    from deploy.bundles import tasks

    tasks.serverapp()
