"""Bouquet: federated LoRA fine-tuning of language models on Flower.

``from bouquet import RULES, LoraStrategy`` and the other names of :data:`NAMES` are the public API.

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
    "Rule": "strategies",
    "build": "strategies",
    "read_config": "strategies",
    "LoraStrategy": "strategies.strategy",
    "Spec": "common.adapter",
    "State": "common.adapter",
    "Update": "common.adapter",
    "BouquetError": "common.error",
}
"""The public names and where they are at home; each is imported when it is asked for."""
__all__ = list(NAMES)


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'bouquet' has no attribute '{name}'")
    return getattr(import_module(NAMES[name]), name)


def main() -> int:
    """The ``bouquet`` command."""
    try:
        from deploy.command import main as command

        return command()
    except KeyboardInterrupt:  # before the command could take care of it
        print("bouquet: interrupted", file=sys.stderr)
        return 130


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
