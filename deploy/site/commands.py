"""`bouquet site`: certificates, keys and kits of a federation, and who is admitted."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from common.config import roster
from deploy import settings
from deploy.settings import Commands
from deploy.site import kit, superlink
from deploy.site.certificates import read_certificate, read_public_key
from deploy.site.folder import Site, SiteFacts
from deploy.site.install import UNITS, install


def add_to(commands: Commands) -> None:
    """The command's arguments."""
    site = commands.add_parser(
        "site",
        help="make certificates, keys and node kits; admit nodes and revoke them",
        description="Example: bouquet site create hospitals --address fl.example.org --nodes ward-1 ward-2",
    )
    parts = site.add_subparsers(dest="part", required=True)
    _add_create(parts)
    _add_kit(parts)
    add = _part(parts, "add", _add, "add a node to a site", "hospitals ward-3")
    add.add_argument("node")
    add.add_argument("--public-key", type=Path, help="the node's own public key; without it the site makes the pair")
    add.add_argument("--weight", type=float, default=1.0, help="see bouquet site weigh (default 1)")
    weigh = _part(parts, "weigh", _weigh, "set a node's weight in runs with declared weights", "hospitals ward-3 1200")
    weigh.add_argument("node")
    weigh.add_argument("weight", type=float, help="such as its number of examples; used in all future runs")
    _part(parts, "register", _register, "make the running SuperLink accept exactly the site's nodes", "hospitals")
    revoke = _part(parts, "revoke", _revoke, "revoke a node, at once and for good", "hospitals ward-3")
    revoke.add_argument("node")
    rotate = _part(
        parts, "rotate", _rotate, "replace a node's key, or the coordinator's certificate", "hospitals ward-1"
    )
    rotate.add_argument("node", nargs="?", help="without it: the coordinator's certificate")
    rotate.add_argument("--public-key", type=Path, help="the node's own new public key")
    rotate.add_argument("--days", type=int, default=825, help="how long a certificate lasts (default 825)")
    _add_install(parts)
    _part(
        parts, "list", _list, "list the nodes, their state at the SuperLink, and when certificates expire", "hospitals"
    )


def _part(
    parts: Commands, name: str, work: Callable[[argparse.Namespace], int], help: str, example: str
) -> argparse.ArgumentParser:
    parser = parts.add_parser(
        name, help=help, description=f"{help.capitalize()}. Example: bouquet site {name} {example}"
    )
    parser.add_argument("site", type=Path, help="the site's folder")
    parser.set_defaults(work=work)
    return parser


def _add_create(parts: Commands) -> None:
    example = "hospitals --address fl.example.org --nodes ward-1 ward-2"
    create = _part(parts, "create", _create, "make a site: its root, the coordinator's certificate, node keys", example)
    create.add_argument("--name", default="", help="the federation's name for flwr run (default: the folder's name)")
    create.add_argument(
        "--address", nargs="+", required=True, help="addresses at which nodes reach the coordinator; kits use the first"
    )
    create.add_argument("--nodes", nargs="*", default=[], help="names of nodes to make keys for")
    create.add_argument("--fleet-port", type=int, default=9092, help="the port for nodes (default 9092)")
    create.add_argument("--control-port", type=int, default=8000, help="the port for flwr, local only (default 8000)")
    create.add_argument("--state", default=kit.STATE, help="the coordinator's state directory")
    create.add_argument(
        "--days", type=int, default=825, help="how long the coordinator's certificate lasts (default 825)"
    )
    create.add_argument("--root-days", type=int, default=3650, help="how long the root lasts (default 3650)")
    _add_place(create, kit.COORDINATOR)


def _add_kit(parts: Commands) -> None:
    example = "hospitals ward-1 data=/data/notes.jsonl lora-rank=8"
    make = _part(parts, "kit", _kit, "complete a node's kit and pack it", example)
    make.add_argument("node")
    make.add_argument(
        "--port",
        type=int,
        default=9094,
        help="SuperNode's port on its own machine; the next two are used too (default 9094)",
    )
    make.add_argument("--keys-user", default="bouquet-keys", help="the user that holds the key (default bouquet-keys)")
    _add_place(make, "/etc/bouquet/<node>")
    make.add_argument(
        "settings", nargs="+", metavar="key=value", help="node config; data= and state-directory= are paths"
    )


def _add_install(parts: Commands) -> None:
    put = parts.add_parser(
        "install",
        help="install a kit, or the coordinator's folder of a site, on this machine",
        description="As root: users, folders, modes, units, and the bundles that may run. It can be repeated. "
        "Example: bouquet site install ward-1.tar.gz",
    )
    put.add_argument("kit", type=Path, help="a packed or unpacked kit, or a site's folder")
    put.add_argument("--units", type=Path, default=UNITS, help=f"the folder of units (default {UNITS})")
    put.add_argument("--replace", action="store_true", help="replace the kit of another site or node")
    put.set_defaults(work=_install)


def _add_place(parser: argparse.ArgumentParser, installed: str) -> None:
    parser.add_argument("--installed", default=installed, help=f"where the kit will be installed (default {installed})")
    parser.add_argument("--programs", default="/opt/bouquet/.venv/bin", help="where flower-supernode will be installed")
    parser.add_argument("--user", default="bouquet", help="the user that executes runs (default bouquet)")
    parser.add_argument("--image", default="", help="the container image, by its digest: registry/name@sha256:...")


def _create(options: argparse.Namespace) -> int:
    facts = SiteFacts(
        name=options.name or options.site.resolve().name,
        addresses=options.address,
        fleet_port=options.fleet_port,
        control_port=options.control_port,
    )
    site = Site.create(options.site, facts, root_days=options.root_days, server_days=options.days)
    site.add(options.nodes)
    place = kit.Place(installed=options.installed, programs=options.programs, user=options.user, image=options.image)
    folder = kit.write_coordinator(site, place, options.state)
    print(f"coordinator: {folder}\nnodes: {', '.join(options.nodes) or 'none yet'} (bouquet site kit packs each one's)")
    return 0


def _add(options: argparse.Namespace) -> int:
    key = read_public_key(options.public_key) if options.public_key else ""
    Site.open(options.site).add([options.node], key, options.weight)
    print(f"{options.node} is added; next: bouquet site kit, then bouquet site register")
    return 0


def _kit(options: argparse.Namespace) -> int:
    place = kit.Place(
        installed=options.installed.replace("<node>", options.node),
        programs=options.programs,
        user=options.user,
        keys_user=options.keys_user,
        image=options.image,
        port=options.port,
    )
    folder = kit.write_node(Site.open(options.site), options.node, place, settings.read(options.settings))
    print(f"kit: {kit.pack(folder)}")
    return 0


def _weigh(options: argparse.Namespace) -> int:
    site = Site.open(options.site)
    site.weigh(options.node, options.weight)
    print(f"{options.node} has weight {options.weight:g}: {_carried(site)}")
    return 0


def _register(options: argparse.Namespace) -> int:
    site = Site.open(options.site)
    done = superlink.synchronise(site)
    print("\n".join([*done, _carried(site)]) if done else "nothing to do")
    return 0


def _revoke(options: argparse.Namespace) -> int:
    site = Site.open(options.site)
    site.revoke(options.node)
    print(f"{options.node} is revoked", *superlink.synchronise(site), _carried(site), sep="\n")
    return 0


def _rotate(options: argparse.Namespace) -> int:
    site = Site.open(options.site)
    if options.node:
        site.rotate(options.node, read_public_key(options.public_key) if options.public_key else "")
        print(f"{options.node} has a new key; next: bouquet site kit, then bouquet site register")
    else:
        site.certify(options.days)
        print(f"{site.coordinator / 'server.crt'} is new: restart the SuperLink")
    return 0


def _carried(site: Site) -> str:
    return f"the roster is {site.coordinator / roster.FILE}: bouquet site install copies it to the coordinator"


def _install(options: argparse.Namespace) -> int:
    print("\n".join(install(options.kit, options.units, options.replace)))
    return 0


def _list(options: argparse.Namespace) -> int:
    site = Site.open(options.site)
    for file in (site.authority / "ca.crt", site.coordinator / "server.crt"):
        left = read_certificate(file).not_valid_after_utc - datetime.now(UTC)
        print(f"{file.name:12} expires in {left.days} days")
    statuses = superlink.statuses(site)
    for name, node in site.facts.nodes.items():
        print(f"{name:12} {statuses.get(node.id, 'not registered')}")
    return 0
