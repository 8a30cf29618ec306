"""`bouquet doctor`: one line per check; the exit code is 1 if one failed."""

import argparse
from pathlib import Path

from common.config.node import NodeConfig
from deploy import settings
from deploy.doctor.check import Check, examine
from deploy.settings import Commands
from deploy.site.folder import Site
from deploy.site.kit_facts import KitFacts
from strategies import read_config


def add_to(commands: Commands) -> None:
    """The command's arguments."""
    doctor = commands.add_parser(
        "doctor",
        help="check a machine before its GPU is busy",
        description="Example: bouquet doctor node /etc/bouquet/ward-1 model.name=/models/llama-3.2-1b",
    )
    places = doctor.add_subparsers(dest="place", required=True)
    for name, folder, work, example in (
        ("node", "the node's kit", _node, "/etc/bouquet/ward-1 model.name=/models/llama-3.2-1b task.max-length=1024"),
        ("coordinator", "the site's folder", _coordinator, "hospitals num-server-rounds=20"),
    ):
        place = places.add_parser(
            name, help=f"check a {name}'s machine", description=f"Example: bouquet doctor {name} {example}"
        )
        place.add_argument("folder", type=Path, help=folder)
        place.add_argument("settings", nargs="*", metavar="key=value", help="the run config of the planned run")
        place.set_defaults(work=work)

    health = places.add_parser(
        "health",
        help="check whether one of Flower's processes is serving",
        description="Example: bouquet doctor health 127.0.0.1:9095",
    )
    health.add_argument("address", help="address of its health service: a SuperNode's port + 1, flwr's port + 1")
    health.set_defaults(work=_health)


def _health(options: argparse.Namespace) -> int:
    from deploy.doctor.network import health

    return 0 if examine([Check("health", lambda: health(options.address))]) else 1


def _node(options: argparse.Namespace) -> int:
    from deploy.doctor import checks  # what knows models takes seconds to import

    config = read_config(settings.read(options.settings))
    kit = KitFacts.read(options.folder)
    node = NodeConfig.read(options.folder / "node.toml")
    found = checks.node(options.folder, kit.superlink, kit.port, node, config)
    return 0 if examine(found) else 1


def _coordinator(options: argparse.Namespace) -> int:
    from deploy.doctor import checks

    config = read_config(settings.read(options.settings))
    return 0 if examine(checks.coordinator(Site.open(options.folder), config)) else 1
