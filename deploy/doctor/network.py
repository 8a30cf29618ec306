"""What lies between the machines: keys, certificates, ports, and the SuperLink itself."""

import os
import socket
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from common.error import BouquetError
from deploy.doctor.check import WarningError
from deploy.site.certificates import addresses_of, openssh, read_certificate, read_public_key

SOON = timedelta(days=30)
TIMEOUT = 5.0


def secret(file: Path) -> str:
    """A secret that exists, and that nobody can read but its owner and, where a cluster mounts it, its group."""
    try:
        mode = file.stat().st_mode & 0o777
    except OSError as error:
        raise BouquetError(
            "a key cannot be read",
            where=str(file),
            got=str(error.strerror),
            cure="Unpack the kit again, as the user that runs Flower.",
        ) from error
    if mode & 0o037:
        raise BouquetError(
            "a key that others can read",
            where=str(file),
            expected="mode 600",
            got=f"{mode:o}",
            cure=f"chmod 600 {file}.",
        )
    return f"{file.name}, mode {mode:o}"


def node_key(file: Path, public: Path) -> str:
    """The node's private key, in the form that Flower takes, and that the site knows its other half."""
    found = secret(file)
    if not os.access(file, os.R_OK):
        return f"{found}, not readable by this user, as it should be for the one that executes runs"
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BouquetError(
            "a key that Flower cannot use", where=str(file), got=str(error), cure="Unpack the kit again."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BouquetError(
            "a key of the wrong type",
            where=str(file),
            expected="an elliptic-curve key",
            got=type(key).__name__,
            cure="Make one with ssh-keygen -t ecdsa -b 384.",
        )
    if openssh(key.public_key()) != read_public_key(public):
        raise BouquetError(
            "a private key from a different pair",
            where=str(file),
            expected=f"the one that matches {public}",
            cure="Unpack the newest kit, or register this key at the site: bouquet site rotate --public-key.",
        )
    return f"{found}, {key.curve.name}"


def certificate(file: Path, issuer: Path | None = None, addresses: Sequence[str] = ()) -> str:
    """A certificate: valid today and for a while, signed by ``issuer``, and for all of ``addresses``."""
    found = read_certificate(file)
    now = datetime.now(UTC)
    ends, starts = found.not_valid_after_utc, found.not_valid_before_utc
    renew = "bouquet site rotate <site>" if issuer else "bouquet site create: a new site, and new kits"
    if now < starts:
        raise BouquetError(
            "a certificate from the future", where=str(file), expected=f"after {starts:%Y-%m-%d}", cure="Set the clock."
        )
    if now > ends:
        raise BouquetError(
            "an expired certificate", where=str(file), expected=f"before {ends:%Y-%m-%d}", cure=f"Renew it: {renew}."
        )
    if issuer:
        try:
            found.verify_directly_issued_by(read_certificate(issuer))
        except (InvalidSignature, ValueError, TypeError) as error:
            raise BouquetError(
                "a certificate from a different root",
                where=str(file),
                expected=f"signed by {issuer}",
                cure=f"Renew it: {renew}.",
            ) from error
    if missing := [address for address in addresses if address not in addresses_of(found)]:
        raise BouquetError(
            "a certificate for other addresses",
            where=str(file),
            expected=", ".join(missing),
            got=", ".join(addresses_of(found)),
            cure=f"Renew it: {renew}.",
        )
    left = f"{(ends - now).days} days left"
    if ends - now < SOON:
        raise WarningError("a certificate expires soon", where=str(file), got=left, cure=f"Renew it: {renew}.")
    return f"{file.name}, {left}"


def port_is_free(port: int, cure: str) -> str:
    """A port that this machine's own process will listen on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise BouquetError("a port in use", where=f"port {port}", got=str(error.strerror), cure=cure) from error
    return f"port {port} is free"


def ours_or_free(port: int, root: Path) -> str:
    """A port of the SuperLink: free before it is started, and its own afterwards."""
    cure = "Stop it, or create the site with another --fleet-port or --control-port."
    return _free_or(port, lambda: superlink(f"127.0.0.1:{port}", root), cure)


def healthy_or_free(port: int) -> str:
    """A port of one of Flower's processes: free before it is started; afterwards its health is at the next port."""
    cure = "Stop it, or choose another port (bouquet site create, bouquet site kit)."
    return _free_or(port, lambda: f"port {port} is in use, {health(f'127.0.0.1:{port + 1}')}", cure)


def _free_or(port: int, ask: Callable[[], str], cure: str) -> str:
    """A port that is free, or whose holder answers as ours does."""
    try:
        return port_is_free(port, cure)
    except BouquetError as taken:
        try:
            return ask()
        except BouquetError as silent:
            raise BouquetError(
                "a port in use by another program, or by one that has stopped serving",
                where=f"port {port}",
                got=str(silent),
                cure=cure,
            ) from taken


def health(address: str) -> str:
    """Ask one of Flower's processes whether it serves, by gRPC's health service."""
    import grpc
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
    from grpc_health.v1.health_pb2_grpc import HealthStub

    with grpc.insecure_channel(address) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=TIMEOUT)
        except grpc.RpcError as error:
            raise BouquetError("nothing answers the health check", where=address, got=_status(error)) from error
    if answer.status != HealthCheckResponse.SERVING:
        raise BouquetError("a process that reports that it is not serving", where=address, got=str(answer.status))
    return f"{address} is serving"


def _status(error: object) -> str:
    """What went wrong with a call: its code and the first line of its details."""
    details = str(getattr(error, "details", lambda: "")() or "").partition("\n")[0]
    return f"{getattr(error, 'code', lambda: error)()}: {details}".removeprefix("StatusCode.")


def superlink(address: str, root: Path) -> str:
    """Reach the SuperLink's port for nodes, check its certificate against the root, and have a call answered."""
    host, port = address.rsplit(":", 1)
    host = host.strip("[]")
    read_certificate(root)
    context = ssl.create_default_context(cafile=str(root))
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), timeout=TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            said = f"{address} answers, {secured.version()}"
        _call(address, root)
        return said
    except ssl.SSLError as error:
        raise BouquetError(
            "the SuperLink's certificate is refused",
            where=address,
            got=error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error.reason),
            cure="Ask the coordinator for a new kit (or a new certificate: bouquet site rotate).",
        ) from error
    except OSError as error:
        raise BouquetError(
            "the SuperLink cannot be reached",
            where=address,
            got=str(error),
            cure="Has it been started (superlink.sh)? Is the port open from here? Is the address right (kit.toml)?",
        ) from error


def _call(address: str, root: Path) -> None:
    """A call without a node's key: a SuperLink that serves refuses it, one that is stuck says nothing."""
    import grpc

    with grpc.secure_channel(address, grpc.ssl_channel_credentials(root.read_bytes())) as channel:
        try:
            channel.unary_unary("/flwr.proto.Fleet/GetRun")(b"", timeout=TIMEOUT)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                return
            raise BouquetError(
                "something listens on the nodes' port but does not serve them",
                where=address,
                expected="an answer of Flower's Fleet API",
                got=_status(error),
                cure="On the coordinator: bouquet doctor coordinator, systemctl restart bouquet-superlink.",
            ) from error
