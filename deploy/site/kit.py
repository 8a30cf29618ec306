"""What the machines of a site are given: a folder that starts a node, and one that starts the coordinator."""

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

from common.error import BouquetError
from common.ledger import witness_of
from common.node_config import NodeConfig
from deploy.site.certificates import write_secret
from deploy.site.folder import Site

TEMPLATES = Path(__file__).parent / "templates"
SECRETS = ("node.key", "server.key", "superexec.secret")


class _Template(Template):
    """Shell and systemd have their own use for the dollar sign."""

    delimiter = "@"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a kit will lie, and where the programs are that it starts."""

    installed: str
    programs: str = "/opt/bouquet/.venv/bin"
    user: str = "bouquet"
    port: int = 9094


def write_coordinator(site: Site, place: Place, state: str) -> Path:
    """Complete the coordinator's folder, and Flower's settings for whoever registers nodes and starts runs."""
    folder, facts = site.coordinator, site.facts
    values = {
        "site": facts.name,
        "label": _label(facts.name),
        "fleet_port": facts.fleet_port,
        "control_port": facts.control_port,
        "state": state,
        **_place(place),
    }
    if not (folder / "superexec.secret").exists():
        write_secret(folder / "superexec.secret", os.urandom(48))
    for name in ("superlink.sh", "superexec.sh"):
        _render(f"coordinator/{name}", folder / name, values, executable=True)
    for name in ("bouquet-superlink.service", "bouquet-superexec.service", "compose.yaml", "kubernetes.yaml"):
        _render(f"coordinator/{name}", folder / name, values)
    connection = {
        "address": f"127.0.0.1:{facts.control_port}",
        "root-certificates": str((site.authority / "ca.crt").resolve()),
    }
    site.flower.mkdir(exist_ok=True, mode=0o700)
    settings = {"superlink": {"default": facts.name, facts.name: connection, "local": {"address": ":local:"}}}
    (site.flower / "config.toml").write_text(tomli_w.dumps(settings))
    return folder


def write_node(site: Site, name: str, place: Place, settings: Mapping[str, Any]) -> Path:
    """Complete a node's kit; ``settings`` are its node config in Flower's flat form. Raises :class:`BouquetError`."""
    site.node(name)
    state = settings.get("state-directory", f"/var/lib/bouquet/{name}")
    # Under another root than the state's, so that what backs up or brings back the one leaves the other alone.
    apart = f"/var/lib/bouquet-witness/{name}/head"
    witness = str(witness_of(Path(state))) if "state-directory" in settings else apart
    usual = {"name": name, "state-directory": state, "privacy-witness": witness}
    settings = {**usual, "policy": f"{place.installed}/policy.toml", **settings}
    node = NodeConfig.from_flower(settings)
    for key, path in (("data", node.data), ("state-directory", node.state_directory), ("policy", node.policy)):
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
    facts = {"site": site.facts.name, "superlink": superlink, "port": place.port}
    (folder / "kit.toml").write_text(tomli_w.dumps(facts))
    (folder / "node.pub").write_text(f"{site.node(name).public_key} {name}\n")
    (folder / "ca.crt").write_bytes((site.authority / "ca.crt").read_bytes())
    values = {
        "site": site.facts.name,
        "node": name,
        "label": _label(f"{site.facts.name}-{name}"),
        "superlink": superlink,
        "state": node.state_directory,
        "witness": node.witness.parent,
        # A node without data of its own takes its part of the run's.
        "data_volume": f'- "{node.data}:{node.data}:ro"' if node.data else "",
        "data_mount": f'- {{name: data, mountPath: "{node.data}", readOnly: true}}' if node.data else "",
        "data_source": f'- {{name: data, hostPath: {{path: "{node.data}"}}}}' if node.data else "",
        **_place(place),
    }
    _render("node/start.sh", folder / "start.sh", values, executable=True)
    for file in ("bouquet-node.service", "compose.yaml", "kubernetes.yaml"):
        _render(f"node/{file}", folder / file, values)
    return folder


def pack(kit: Path) -> Path:
    """A kit as a tarball of mode 0600 beside its folder, with the modes that each file has to have."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for file in sorted(path for path in kit.iterdir() if path.is_file()):
            facts = tarfile.TarInfo(f"{kit.name}/{file.name}")
            facts.size = file.stat().st_size
            facts.mode = 0o600 if file.name in SECRETS else 0o755 if file.suffix == ".sh" else 0o644
            with file.open("rb") as opened:
                tar.addfile(facts, opened)
    packed = kit.with_name(f"{kit.name}.tar.gz")
    write_secret(packed, archive.getvalue())
    return packed


def _place(place: Place) -> dict[str, Any]:
    return {**vars(place), "version": version("bouquet")}


def _label(name: str) -> str:
    """A name as Kubernetes takes it for services: 63 characters with the prefix, and no dots."""
    return name.replace(".", "-")[: 63 - len("bouquet-")].rstrip("-")


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _render(template: str, file: Path, values: Mapping[str, Any], *, executable: bool = False) -> None:
    file.write_text(_Template((TEMPLATES / template).read_text()).substitute(values))
    file.chmod(0o755 if executable else 0o644)
