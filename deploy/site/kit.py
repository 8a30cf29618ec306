"""The kits of a site's machines: a folder that starts a node, and one that starts the coordinator."""

import io
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import tomli_w
from pydantic import ValidationError

from common import durable
from common.config.node import NodeConfig, witness_of
from common.error import BouquetError
from deploy.flower import OFTEN, QUIET
from deploy.site.folder import Site
from deploy.site.kit_facts import FILE as KIT_FILE
from deploy.site.kit_facts import KitFacts

TEMPLATES = Path(__file__).parent / "templates"
COORDINATOR, STATE = "/etc/bouquet/coordinator", "/var/lib/bouquet"
"""Where the coordinator's kit and its state lie, unless a site says otherwise."""
SECRETS = ("node.key", "server.key", "superexec.secret")


class _Template(Template):
    """Shell and systemd have their own use for the dollar sign."""

    delimiter = "@"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a kit will lie, and where the programs are that it starts.

    ``user`` runs the code of runs, on the data; ``keys_user`` holds a node's key and runs nobody's code. The health
    services of the two processes are at the next two ports after ``port``.
    """

    installed: str
    programs: str = "/opt/bouquet/.venv/bin"
    user: str = "bouquet"
    keys_user: str = "bouquet-keys"
    image: str = ""
    port: int = 9094


def write_coordinator(site: Site, place: Place, state: str) -> Path:
    """Complete the coordinator's folder, and Flower's settings for whoever registers nodes and starts runs."""
    folder, facts = site.coordinator, site.facts
    kit = _facts(site=facts.name, name=facts.name, place=place, state=state, port=facts.control_port)
    kit.write(folder)
    if not (folder / "superexec.secret").exists():
        durable.write(folder / "superexec.secret", os.urandom(48), durable.PRIVATE)
    values = _write_coordinators_scripts(site, kit)
    values |= {"label": _label(facts.name), "image": place.image or f"bouquet-coordinator:{version('bouquet')}"}
    for name in ("compose.yaml", "kubernetes.yaml"):
        _render(f"coordinator/{name}", folder / name, values)
    connection = {
        "address": f"127.0.0.1:{facts.control_port}",
        "root-certificates": str((site.authority / "ca.crt").resolve()),
    }
    site.flower.mkdir(exist_ok=True, mode=0o700)
    settings = {"superlink": {"default": facts.name, facts.name: connection, "local": {"address": ":local:"}}}
    (site.flower / "config.toml").write_text(tomli_w.dumps(settings))
    return folder


def renew(site: Site) -> None:
    """Make the coordinator's scripts and units those of this release, for the place that they were made for.

    A site of 0.1.0 does not say which: it gets the usual one.
    """
    if not (site.coordinator / KIT_FILE).exists():
        write_coordinator(site, Place(installed=COORDINATOR), STATE)
    _write_coordinators_scripts(site, KitFacts.read(site.coordinator))


def _write_coordinators_scripts(site: Site, kit: KitFacts) -> dict[str, Any]:
    """Write them; returns what the templates were filled with."""
    values = _values(kit) | {"fleet_port": site.facts.fleet_port, "control_port": site.facts.control_port}
    for name in ("superlink.sh", "superexec.sh"):
        _render(f"coordinator/{name}", site.coordinator / name, values, executable=True)
    for name in ("bouquet-superlink.service", "bouquet-superexec.service"):
        _render(f"coordinator/{name}", site.coordinator / name, values)
    return values


def write_node(site: Site, name: str, place: Place, settings: Mapping[str, Any]) -> Path:
    """Complete a node's kit; ``settings`` are its node config in Flower's flat form. Raises :class:`BouquetError`."""
    site.node(name)
    state = settings.get("state-directory", f"/var/lib/bouquet/{name}")
    # Under another root than the state's, so that what backs up or brings back the one leaves the other alone.
    apart = f"/var/lib/bouquet-witness/{name}/head"
    witness = str(witness_of(Path(state))) if "state-directory" in settings else apart
    link = f"{state}.link" if "state-directory" in settings else f"/var/lib/bouquet-link/{name}"
    usual = {"name": name, "state-directory": state, "privacy-witness": witness}
    settings = {**usual, "policy": f"{place.installed}/policy.toml", **settings}
    node = NodeConfig.from_flower(settings)
    for key, path in (
        ("data", node.data),
        ("script", node.script),
        ("state-directory", node.state_directory),
        ("policy", node.policy),
    ):
        if path and not Path(path).is_absolute():
            raise BouquetError(
                "a path that is not absolute",
                where=f"{name}, {key}",
                expected="a path on the node's machine",
                got=repr(path),
            )
    superlink = _host_port(site.facts.addresses[0], site.facts.fleet_port)
    folder = site.kits / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "node.toml").write_text(tomli_w.dumps(settings))
    if not (folder / "policy.toml").exists():  # it is the operator's from then on
        _render("node/policy.toml", folder / "policy.toml", {"node": name, "site": site.facts.name})
    own = {"witness": str(node.witness.parent), "keys_user": place.keys_user, "keys_state": link, "port": place.port}
    facts = _facts(site=site.facts.name, name=name, place=place, state=state, superlink=superlink, **own)
    facts.write(folder)
    (folder / "node.pub").write_text(f"{site.node(name).public_key} {name}\n")
    (folder / "ca.crt").write_bytes((site.authority / "ca.crt").read_bytes())
    write_scripts(folder, facts)
    label = _label(f"{site.facts.name}-{name}")
    image = place.image or f"bouquet-node:{version('bouquet')}"
    gpus = len({each for device in node.devices for each in device.split("+")})
    more = {"label": label, "image": image, "gpus": gpus, "fleet_port": site.facts.fleet_port}
    more |= _data(node.data, label)
    for file in ("compose.yaml", "kubernetes.yaml"):
        _render(f"node/{file}", folder / file, _values(facts) | more)
    return folder


def write_scripts(folder: Path, facts: KitFacts) -> None:
    """The scripts and units of a node, which follow from its facts and from this release alone."""
    for file in ("start.sh", "supernode.sh", "superexec.sh"):
        _render(f"node/{file}", folder / file, _values(facts), executable=True)
    for part in ("supernode", "superexec"):
        _render(f"node/{part}.service", folder / f"bouquet-{facts.name}-{part}.service", _values(facts))


def _facts(*, place: Place, **facts: Any) -> KitFacts:
    """A kit's facts. Raises :class:`BouquetError` on one that a machine would not take."""
    try:
        return KitFacts(installed=place.installed, programs=place.programs, user=place.user, **facts)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise BouquetError(
            "a kit that cannot be created",
            where=f"{facts['name']}, {wrong['loc'][0]}",
            expected="a plain name, or an absolute path of letters, digits, dots, hyphens and underscores",
            got=repr(wrong["input"]),
        ) from error


def _values(facts: KitFacts) -> dict[str, Any]:
    """What the templates call the facts of a kit."""
    quiet, often = (" ".join(f"{name}={value}" for name, value in own.items()) for own in (QUIET, OFTEN))
    derived = {"node": facts.name, "link": facts.keys_state, "health": facts.port + 1, "exec_health": facts.port + 2}
    hardening = (TEMPLATES / "hardening.conf").read_text()
    return {
        **facts.model_dump(),
        **derived,
        "group": facts.user,
        "hardening": hardening,
        "quiet": quiet,
        "often": often,
    }


def _data(data: str, label: str) -> dict[str, str]:
    """The mounts of a node's own data; a node without any takes its part of the run's."""
    if not data:
        return dict.fromkeys(("data_volume", "data_mount", "data_source"), "")
    claim = f"{{claimName: bouquet-{label}-data, readOnly: true}}"
    return {
        "data_volume": f'- "{data}:{data}:ro"',
        "data_mount": f'- {{name: data, mountPath: "{Path(data).parent}", readOnly: true}}',
        "data_source": f"- {{name: data, persistentVolumeClaim: {claim}}}",
    }


def mode_of(name: str) -> int:
    """The mode that a file of a kit has to have."""
    return 0o600 if name in SECRETS else 0o755 if name.endswith(".sh") else 0o644


def pack(kit: Path) -> Path:
    """A kit as a tarball of mode 0600 beside its folder, with the modes that each file has to have."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for file in sorted(path for path in kit.iterdir() if path.is_file()):
            facts = tarfile.TarInfo(f"{kit.name}/{file.name}")
            facts.size = file.stat().st_size
            facts.mode = mode_of(file.name)
            with file.open("rb") as opened:
                tar.addfile(facts, opened)
    packed = kit.with_name(f"{kit.name}.tar.gz")
    durable.write(packed, archive.getvalue(), durable.PRIVATE)
    return packed


def _label(name: str) -> str:
    """A name as Kubernetes takes it for services: 63 characters with the prefix, and no dots."""
    return name.replace(".", "-")[: 63 - len("bouquet-")].rstrip("-")


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _render(template: str, file: Path, values: Mapping[str, Any], *, executable: bool = False) -> None:
    file.write_text(_Template((TEMPLATES / template).read_text()).substitute(values))
    file.chmod(0o755 if executable else 0o644)
