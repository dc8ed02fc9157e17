"""Keys and certificates of a federation, for its development: an authority, the server's certificate, a key a node."""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedssl.errors import ConfigError

_EARLIER = datetime.timedelta(hours=1)  # certificates are valid for machines whose clock is behind


def make(folder: Path, nodes: int, hosts: Sequence[str], days: int = 365) -> list[Path]:
    """Write all keys of a federation into a new folder; private ones can be read by their owner alone.

    `ca.crt` goes to every machine. `server.crt`, `server.key` and `superexec.secret` stay on the SuperLink's, and
    `node-K.key` goes to node K alone, whose public half `node-K.pub` is registered with the SuperLink. `ca.key` signs
    further servers and belongs on none of these machines.

    Args:
        folder: is made; every file of it is there or none.
        nodes: how many keys of SuperNodes.
        hosts: names and addresses under which nodes reach the SuperLink.
        days: how long the certificates are valid.

    Returns:
        What has been written.

    Raises:
        ConfigError: the folder exists or cannot be written, there are no nodes, or a host is neither a name nor an
            address.
    """
    if nodes < 1 or days < 1 or not hosts:
        raise ConfigError(
            f"{nodes} nodes, {len(hosts)} hosts and {days} days: give at least one of each to make keys for"
        )
    names = [_subject(host) for host in hosts]
    if folder.exists():
        raise ConfigError(f"{folder} exists, and keys are never overwritten: pass another folder, or remove that one")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, mode=0o700)
        for name, content in _files(nodes, names, datetime.timedelta(days=days)).items():
            private = not name.endswith((".crt", ".pub"))
            handle = os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        temporary.rename(folder)
    except OSError as error:
        with suppress(OSError):
            shutil.rmtree(temporary)
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): pass another folder") from error
    return sorted(folder.iterdir())


def _subject(host: str) -> x509.GeneralName:
    """As a certificate names a host."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.rstrip(".").split(".")
    if not all(label.isascii() and label.replace("-", "").isalnum() and len(label) < 64 for label in labels):
        raise ConfigError(f"--host {host!r} is neither a name nor an address: give fl.example.org or 10.0.0.5")
    return x509.DNSName(host)


def _files(nodes: int, hosts: Sequence[x509.GeneralName], valid: datetime.timedelta) -> dict[str, bytes]:
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedssl development authority")])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    ) | {"decipher_only": False}
    root = (
        _certificate(name, authority.public_key(), valid)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedssl SuperLink")])
    leaf = (
        _certificate(own, server.public_key(), valid)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    files = {
        "ca.crt": root.public_bytes(Encoding.PEM),
        "ca.key": _private(authority, PrivateFormat.PKCS8),
        "server.crt": leaf.public_bytes(Encoding.PEM),
        "server.key": _private(server, PrivateFormat.PKCS8),
        "superexec.secret": secrets.token_hex(32).encode(),
    }
    for node in range(nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        files[f"node-{node}.key"] = _private(key, PrivateFormat.OpenSSH)  # the form that Flower reads
        files[f"node-{node}.pub"] = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"
    return files


def _certificate(name: x509.Name, key: ec.EllipticCurvePublicKey, valid: datetime.timedelta) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + valid)
    )


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())
