"""Keys, certificates, clocks and ports: what keeps a node from its SuperLink is named."""

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from flwr.supercore.grpc_health import run_health_server_grpc_no_tls

from common.error import BouquetError
from deploy.command import main
from deploy.doctor import machine, network
from deploy.doctor.check import WarningError
from deploy.site import certificates
from deploy.site.folder import Site
from tests.support.ports import free_port


@pytest.fixture
def stuck(site) -> Iterator[str]:
    """What accepts connections at the port for nodes, shakes hands, and serves nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site / "coordinator/server.crt", site / "coordinator/server.key")
    context.set_alpn_protocols(["h2"])
    port = Site.open(site).facts.fleet_port
    kept = []
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer() -> None:
            while True:
                try:
                    kept.append(context.wrap_socket(server.accept()[0], server_side=True))
                except ssl.SSLError:
                    continue
                except OSError:
                    break
            for link in kept:
                link.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"localhost:{port}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def serving(port: int) -> grpc.Server:
    """A process of Flower's that says it is healthy."""
    return run_health_server_grpc_no_tls(f"127.0.0.1:{port}")


def test_a_missing_or_foreign_key_is_named(kit):
    (kit / "node.key").write_text("nothing")
    with pytest.raises(BouquetError, match=r"a key that Flower cannot use .*Unpack the kit again"):
        network.node_key(kit / "node.key", kit / "node.pub")
    (kit / "node.key").write_bytes(certificates.make_node_key()[0])
    with pytest.raises(
        BouquetError,
        match=r"a private key from a different pair .*expected the one that matches .*node.pub. Unpack the",
    ):
        network.node_key(kit / "node.key", kit / "node.pub")
    (kit / "node.key").unlink()
    with pytest.raises(BouquetError, match=r"a key cannot be read .*got No such file"):
        network.node_key(kit / "node.key", kit / "node.pub")


def signed(folder: Path, days: int, addresses: list[str], ca: Path) -> Path:
    root = certificates.Signed((ca / "ca.crt").read_bytes(), (ca / "ca.key").read_bytes())
    file = folder / f"server-{days}.crt"
    file.write_bytes(certificates.issue(root, addresses, days).certificate)
    return file


def test_certificates_that_will_not_do_are_named(site, tmp_path):
    ca = site / "ca"
    with pytest.raises(BouquetError, match=r"an expired certificate .*Renew it: bouquet site rotate"):
        network.certificate(signed(tmp_path, 0, ["a"], ca), ca / "ca.crt")
    with pytest.raises(WarningError, match=r"a certificate expires soon .*got 9 days left. Renew it"):
        network.certificate(signed(tmp_path, 10, ["a"], ca), ca / "ca.crt")
    with pytest.raises(BouquetError, match=r"a certificate for other addresses .*expected b, got a, localhost"):
        network.certificate(signed(tmp_path, 100, ["a"], ca), ca / "ca.crt", ["a", "b"])
    other = certificates.make_authority("other", 100)
    (tmp_path / "other.crt").write_bytes(other.certificate)
    with pytest.raises(BouquetError, match=r"a certificate from a different root .*signed by .*other.crt"):
        network.certificate(signed(tmp_path, 100, ["a"], ca), tmp_path / "other.crt")
    (tmp_path / "bad.crt").write_text("nothing")
    with pytest.raises(BouquetError, match=r"a certificate cannot be read .*Copy it again from the kit"):
        network.certificate(tmp_path / "bad.crt")


def test_a_clock_that_is_behind_is_named(site, monkeypatch):
    class Yesterday(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) - timedelta(days=2)

    monkeypatch.setattr(network, "datetime", Yesterday)
    with pytest.raises(BouquetError, match=r"a certificate from the future .*Set the clock"):
        network.certificate(site / "ca/ca.crt")


@pytest.mark.parametrize(
    ("answer", "raised", "message"),
    [
        ("#!/bin/sh\necho yes\n", None, "synchronised"),
        ("#!/bin/sh\necho no\n", WarningError, "the clock is not synchronised. timedatectl set-ntp true"),
        (None, WarningError, "nothing here knows whether the clock is right"),
    ],
)
def test_the_clock_is_asked_of_systemd(answer, raised, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path) + (os.pathsep + "/bin" if answer else ""))
    if answer:
        (tmp_path / "timedatectl").write_text(answer)
        (tmp_path / "timedatectl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    if raised is None:
        assert machine.clock() == message
    else:
        with pytest.raises(raised, match=message):
            machine.clock()


def test_a_superlink_that_is_away_or_someone_elses_is_named(site, superlink, tmp_path):
    assert "TLSv1.3" in network.superlink(superlink, site / "ca/ca.crt")
    other = tmp_path / "other.crt"
    other.write_bytes(certificates.make_authority("other", 100).certificate)
    with pytest.raises(BouquetError, match=r"the SuperLink's certificate is refused .*unable to get local issuer"):
        network.superlink(superlink, other)
    with pytest.raises(BouquetError, match=r"the SuperLink cannot be reached .*refused. Has it been started"):
        network.superlink(f"localhost:{free_port()}", site / "ca/ca.crt")


def test_a_superlink_that_listens_and_serves_nobody_is_named(site, stuck, monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 1.0)
    with pytest.raises(
        BouquetError, match=r"something listens on the nodes' port but does not serve them .*DEADLINE_EXCEEDED"
    ):
        network.superlink(stuck, site / "ca/ca.crt")


def test_a_node_that_runs_already_is_asked_for_its_health(capsys):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(BouquetError, match=r"by one that has stopped serving .*UNAVAILABLE"):
            network.healthy_or_free(port)
        server = serving(port + 1)
        try:
            assert network.healthy_or_free(port) == f"port {port} is in use, 127.0.0.1:{port + 1} is serving"
            assert main(["doctor", "health", f"127.0.0.1:{port + 1}"]) == 0
        finally:
            server.stop(None).wait(5)
        assert main(["doctor", "health", f"127.0.0.1:{port + 1}"]) == 1
    assert "nothing answers the health check" in capsys.readouterr().out


def test_a_port_in_use_is_named(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BouquetError, match=rf"a port in use \(port {port}\).*Stop it"):
            network.port_is_free(port, "Stop it.")


def test_a_port_of_another_program_is_named(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        threading.Thread(target=lambda: taken.accept()[0].close(), daemon=True).start()
        with pytest.raises(BouquetError, match=r"a port in use by another program.*with another --fleet-port"):
            network.ours_or_free(taken.getsockname()[1], site / "ca/ca.crt")
