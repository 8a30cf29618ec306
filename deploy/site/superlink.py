"""The nodes' keys at the SuperLink: registered, listed and dropped through Flower's own `flwr supernode`."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common.error import BouquetError
from deploy.flower import environment, program
from deploy.site.folder import Site


def synchronise(site: Site) -> list[str]:
    """Make the SuperLink accept exactly the site's nodes; return what was done, a line a node.

    Interrupted, it is simply run again. Raises :class:`BouquetError` if the SuperLink cannot be reached.
    """
    facts, done = site.facts, []
    accepted = statuses(site)
    for old in list(facts.dropped):
        if old in accepted:
            _flwr(site, "unregister", str(old))
            done.append(f"dropped {old}")
        facts.dropped.remove(old)
        site.save()
    for name, node in facts.nodes.items():
        if node.id in accepted:
            continue
        node.id = _register(site, name, node.public_key)
        site.save()
        done.append(f"registered {name} as {node.id}")
    return done


def statuses(site: Site) -> dict[int, str]:
    """What the SuperLink knows of the keys it accepts, by Flower's id: registered, online or offline."""
    listed = _flwr(site, "list")["nodes"]
    return {int(node["node-id"]): str(node["status"]) for node in listed if node["status"] != "unregistered"}


def _register(site: Site, name: str, public_key: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.pub"
        file.write_text(public_key + "\n")
        return int(_flwr(site, "register", str(file), name=name)["node-id"])


def _flwr(site: Site, command: str, *arguments: str, name: str = "") -> dict[str, Any]:
    """The JSON answer of one `flwr supernode` command. Raises :class:`BouquetError` with Flower's own message."""
    named = ["--name", name] if name else []
    finished = subprocess.run(
        [program("flwr"), "supernode", command, *arguments, site.facts.name, *named, "--format", "json"],
        env=environment({"FLWR_HOME": str(site.flower.resolve())}),
        capture_output=True,
        text=True,
        check=False,
    )
    answer = _json(finished.stdout)
    if finished.returncode or not answer.get("success"):
        said = answer.get("error-message") or finished.stderr or finished.stdout
        raise BouquetError(
            f"the SuperLink refused 'flwr supernode {command}'",
            where=f"127.0.0.1:{site.facts.control_port}",
            got=str(said).strip().splitlines()[-1] if str(said).strip() else "no answer",
            cure="Start the coordinator (coordinator/superlink.sh), or reach it: ssh -L "
            f"{site.facts.control_port}:127.0.0.1:{site.facts.control_port} <coordinator>.",
        )
    return answer


def _json(text: str) -> dict[str, Any]:
    """The last JSON object of what a command printed, or nothing."""
    start = text.find("{")
    try:
        found: dict[str, Any] = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return found
