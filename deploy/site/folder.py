"""A site: one federation's folder, kept by whoever runs the coordinator.

site.json       what the site is: addresses, ports, every node's public key and Flower id
ca/             the root certificate and its key
coordinator/    what the coordinator's machine needs
kits/<node>/    what a node's machine needs; its private key is here and nowhere else
flower/         Flower's own connection settings, for FLWR_HOME
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import durable
from common.adapter.limits import HEAVIEST
from common.config import roster
from common.config.ranges import Weight, is_node_name
from common.config.roster import Registered
from common.error import BouquetError, did_you_mean
from deploy.site import certificates
from deploy.site.certificates import Signed

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


class Facts(BaseModel):
    """A strict record of ``site.json``."""

    model_config = ConfigDict(strict=True, extra="forbid")


class NodeFacts(Facts):
    """One node: its public key, its id at the SuperLink (0: not yet there), its weight where weights are declared."""

    public_key: str
    id: int = 0
    weight: Weight = 1.0


class SiteFacts(Facts):
    """The contents of ``site.json``.

    ``addresses`` are where nodes reach the coordinator, the first one in every kit. ``dropped`` are the Flower ids of
    keys that were revoked or replaced and that the SuperLink still has to be told of; ``revoked`` are the keys
    themselves, which never come back.
    """

    name: str
    addresses: list[str] = Field(min_length=1)
    fleet_port: int = 9092
    control_port: int = 8000
    nodes: dict[str, NodeFacts] = {}
    dropped: list[int] = []
    revoked: list[str] = []


class Site:
    """A site's folder."""

    def __init__(self, folder: Path, facts: SiteFacts) -> None:
        self.folder = folder
        self.facts = facts

    @classmethod
    def create(cls, folder: Path, facts: SiteFacts, *, root_days: int, server_days: int) -> Self:
        """A new site with its root and the coordinator's certificate. Raises :class:`BouquetError` if there is one."""
        if (folder / "site.json").exists():
            raise BouquetError("a site already exists", where=str(folder), cure="Add nodes to it: bouquet site add.")
        for address in facts.addresses:
            _check(r"[A-Za-z0-9.:-]+", address, "an address", "a host name or an IP address")
        _check(NAME.pattern, facts.name, "a site's name", "lower-case letters, digits, dots and hyphens")
        site = cls(folder, facts)
        for part in (folder, site.authority, site.coordinator, site.kits):
            part.mkdir(parents=True, exist_ok=True, mode=0o700)
        root = certificates.make_authority(facts.name, root_days)
        durable.write(site.authority / "ca.key", root.key, durable.PRIVATE)
        (site.authority / "ca.crt").write_bytes(root.certificate)
        site.certify(server_days)
        site.save()
        return site

    @classmethod
    def open(cls, folder: Path) -> Self:
        """An existing site. Raises :class:`BouquetError` where there is none."""
        try:
            return cls(folder, SiteFacts.model_validate_json((folder / "site.json").read_text()))
        except FileNotFoundError:
            raise BouquetError(
                "there is no site here", where=str(folder), cure="Make one: bouquet site create."
            ) from None
        except (OSError, ValidationError) as error:
            raise BouquetError(
                "a site cannot be read", where=str(folder / "site.json"), got=str(error).splitlines()[0]
            ) from error

    @property
    def authority(self) -> Path:
        """The folder of the root certificate and its key."""
        return self.folder / "ca"

    @property
    def coordinator(self) -> Path:
        """The folder of what the coordinator's machine needs."""
        return self.folder / "coordinator"

    @property
    def kits(self) -> Path:
        """The folder of the nodes' kits."""
        return self.folder / "kits"

    @property
    def flower(self) -> Path:
        """The folder of Flower's connection settings."""
        return self.folder / "flower"

    def save(self) -> None:
        """Write ``site.json`` in one step, and what the coordinator has to know of it."""
        durable.write(self.folder / "site.json", f"{self.facts.model_dump_json(indent=2)}\n".encode(), durable.PRIVATE)
        nodes = self.facts.nodes.items()
        known = {node.id: Registered(name=name, weight=node.weight) for name, node in nodes if node.id}
        durable.write(self.coordinator / roster.FILE, roster.dumped(known), durable.PRIVATE)

    def certify(self, days: int) -> None:
        """A new certificate for the coordinator, from the same root: nodes need not hear of it."""
        try:
            root = Signed((self.authority / "ca.crt").read_bytes(), (self.authority / "ca.key").read_bytes())
        except OSError as error:
            raise BouquetError("the root cannot be read", where=str(self.authority), got=str(error)) from error
        server = certificates.issue(root, self.facts.addresses, days)
        durable.write(self.coordinator / "server.key", server.key, durable.PRIVATE)
        (self.coordinator / "server.crt").write_bytes(server.certificate)
        (self.coordinator / "ca.crt").write_bytes(root.certificate)

    def add(self, names: Sequence[str], public_key: str = "", weight: float = 1.0) -> None:
        """Add nodes. ``public_key`` is one that the node has made for itself; without it, the site makes the pair.

        ``weight`` is what the node counts for in runs with ``train.weighting = "declared"``.
        """
        _check_weight(weight, names)
        for name in names:
            _check(NAME.pattern, name, "a node's name", "lower-case letters, digits, dots and hyphens")
            if not is_node_name(name):
                raise BouquetError("a node name with another meaning", where=name, cure="Choose another.")
            if name in self.facts.nodes:
                raise BouquetError(
                    "a node with this name exists", where=name, cure="Replace its key: bouquet site rotate."
                )
        for name in names:
            self.facts.nodes[name] = NodeFacts(public_key=self._key(name, public_key), weight=weight)
        self.save()

    def weigh(self, name: str, weight: float) -> None:
        """What a node counts for from now on."""
        _check_weight(weight, [name])
        self.node(name).weight = weight
        self.save()

    def rotate(self, name: str, public_key: str = "") -> None:
        """Replace a node's key; the old one is dropped at the next registration."""
        node = self.node(name)
        replacement = NodeFacts(public_key=self._key(name, public_key), weight=node.weight)
        self._drop(node)
        self.facts.nodes[name] = replacement
        self.save()

    def revoke(self, name: str) -> None:
        """Shut a node out: its key is dropped and never accepted again."""
        self._drop(self.node(name))
        del self.facts.nodes[name]
        self.save()

    def node(self, name: str) -> NodeFacts:
        """One node. Raises :class:`BouquetError` where there is none of this name."""
        if name not in self.facts.nodes:
            raise BouquetError(
                "there is no node with this name",
                where=name,
                cure=did_you_mean(name, self.facts.nodes) or "See bouquet site list.",
            )
        return self.facts.nodes[name]

    def _key(self, name: str, public_key: str) -> str:
        """The public key of a node, checked; a private one is made for it and put into its kit if there is none."""
        owners = {node.public_key: other for other, node in self.facts.nodes.items()}
        if public_key in owners:
            raise BouquetError(
                "two nodes with one key", where=f"{name}, {owners[public_key]}", cure="Give each its own."
            )
        if public_key in self.facts.revoked:
            raise BouquetError("a revoked key", where=name, cure="Make a new one.")
        if public_key:
            return public_key
        private, public_key = certificates.make_node_key()
        kit = self.kits / name
        kit.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.write(kit / "node.key", private, durable.PRIVATE)
        return public_key

    def _drop(self, node: NodeFacts) -> None:
        self.facts.revoked.append(node.public_key)
        if node.id:
            self.facts.dropped.append(node.id)


def _check_weight(weight: float, names: Sequence[str]) -> None:
    if not 0 < weight <= HEAVIEST:
        raise BouquetError(
            "a weight that cannot be used",
            where=", ".join(names),
            expected=f"a number above 0, at most {HEAVIEST:g}",
            got=f"{weight:g}",
        )


def _check(pattern: str, value: str, what: str, expected: str) -> None:
    if not re.fullmatch(pattern, value):
        raise BouquetError(f"{what} that cannot be used", expected=expected, got=repr(value))
