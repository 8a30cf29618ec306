"""X.509 certificates of the coordinator and key pairs of the nodes: on NIST P-384, as Flower wants them."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.error import BouquetError

# The Runtime API of a SuperLink is used from its own machine.
LOOPBACK = ("localhost", "127.0.0.1")
# A clock that is slow must not refuse a certificate made a moment ago.
BACKDATED = timedelta(hours=1)


class Signed(NamedTuple):
    """A certificate and its private key, both as PEM."""

    certificate: bytes
    key: bytes


def make_authority(name: str, days: int) -> Signed:
    """A self-signed root that may sign servers and nothing below another authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject(f"{name} root")
    builder = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
    )
    return _sign(builder, key, key)


def issue(authority: Signed, addresses: Sequence[str], days: int) -> Signed:
    """A server certificate for host names and IP addresses, those of the machine itself included."""
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    signer = serialization.load_pem_private_key(authority.key, password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise BouquetError("a root key of the wrong type", expected="an elliptic-curve key", got=type(signer).__name__)
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_alternative_name(address) for address in dict.fromkeys((*addresses, *LOOPBACK))]
    builder = (
        _builder(_subject(addresses[0]), issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    return _sign(builder, key, signer)


def make_node_key() -> tuple[bytes, str]:
    """A node's key pair in OpenSSH's form: the private key, and the public key as one line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, openssh(key.public_key())


def read_public_key(file: Path) -> str:
    """A node's public key from an OpenSSH file. Raises :class:`BouquetError` if Flower would not take it."""
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise BouquetError(
            "a public key cannot be read", where=str(file), got=str(error), cure="Make one with ssh-keygen -t ecdsa."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BouquetError(
            "a public key of the wrong type",
            where=str(file),
            expected="an elliptic-curve key",
            got=type(key).__name__,
            cure="Make one with ssh-keygen -t ecdsa -b 384.",
        )
    return openssh(key)


def read_certificate(file: Path) -> x509.Certificate:
    """A PEM certificate. Raises :class:`BouquetError`."""
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise BouquetError(
            "a certificate cannot be read", where=str(file), got=str(error), cure="Copy it again from the kit."
        ) from error


def addresses_of(certificate: x509.Certificate) -> list[str]:
    """The host names and IP addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start = datetime.now(UTC) - BACKDATED
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _sign(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> Signed:
    certificate = builder.sign(signer, hashes.SHA384())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Signed(certificate.public_bytes(serialization.Encoding.PEM), private)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def openssh(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as one line."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
