"""A site of one node whose kit is installed, and a SuperLink that knows no key."""

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from deploy.command import main
from deploy.site.folder import Site
from tests.support.ports import free_port
from tests.support.processes import UNPRIVILEGED


@pytest.fixture
def site(tmp_path) -> Path:
    folder = tmp_path / "hospitals"
    ports = ["--fleet-port", str(free_port()), "--control-port", str(free_port())]
    place = [
        "--user",
        UNPRIVILEGED,
        "--installed",
        str(tmp_path / "etc/coordinator"),
        "--state",
        str(tmp_path / "coordinator"),
    ]
    assert main(["site", "create", str(folder), "--address", "localhost", "--nodes", "ward-1", *ports, *place]) == 0
    data = tmp_path / "notes.jsonl"
    data.write_text("".join(json.dumps({"text": f"def f{i}(self):\n    return {i}\n"}) + "\n" for i in range(20)))
    own = [f"data={data}", f"state-directory={tmp_path / 'state'}", "--port", str(free_port())]
    own += ["--installed", str(tmp_path / "etc/ward-1"), "--user", UNPRIVILEGED, "--keys-user", UNPRIVILEGED]
    assert main(["site", "kit", str(folder), "ward-1", *own]) == 0
    for kit in (folder, folder / "kits/ward-1.tar.gz"):
        assert main(["site", "install", str(kit), "--units", str(tmp_path / "units")]) == 0
    return folder


@pytest.fixture
def kit(site, tmp_path) -> Path:
    """The kit as it is installed."""
    return tmp_path / "etc/ward-1"


@pytest.fixture
def superlink(site) -> Iterator[str]:
    """What answers with the site's certificate at the port for nodes, and refuses every call without a node's key."""

    class Refuses(grpc.GenericRpcHandler):
        def service(self, handler_call_details):
            return grpc.unary_unary_rpc_method_handler(
                lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no key")
            )

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Refuses()])
    pair = [((site / "coordinator/server.key").read_bytes(), (site / "coordinator/server.crt").read_bytes())]
    address = f"localhost:{Site.open(site).facts.fleet_port}"
    server.add_secure_port(address, grpc.ssl_server_credentials(pair))
    server.start()
    yield address
    server.stop(None).wait(5)
