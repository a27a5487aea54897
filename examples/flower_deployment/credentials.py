"""Certificates and keys for a rehearsal on one machine; not for real sites."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_VALID_DAYS = 7


def make_authority(folder: Path, name: str = "ca") -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Create a certificate authority and write its certificate to FOLDER/NAME.pem."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedekd rehearsal {name}")])
    certificate = (
        _builder(subject, subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def make_server_certificate(
    folder: Path, authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate], name: str = "server"
) -> None:
    """Create a server certificate for localhost: FOLDER/NAME.pem and FOLDER/NAME.key."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        _builder(subject, authority[1].subject, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority[0], hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_key(folder / f"{name}.key", key)


def make_node_key(folder: Path, name: str) -> None:
    """Create the key pair of a SuperNode: FOLDER/NAME and FOLDER/NAME.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(folder / name, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
    )


def _write_key(
    path: Path,
    key: ec.EllipticCurvePrivateKey,
    private_format: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, private_format, serialization.NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(content)
