"""A party's certificate: read, checked against the federation's root, the clock and the party's name."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from anyrank.errors import DeployError, in_a_line
from anyrank.files import read_bounded

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_MOST_BYTES = 1 << 16
SOON_DAYS = 30  # before the end of a certificate, from which on its renewal is asked for
RENEW = "the owner renews it with: anyrank deploy provision --renew"


def read(path: Path) -> Certificate:
    """The certificate in a PEM file. Raises `DeployError`."""
    from cryptography.x509 import load_pem_x509_certificate

    return _read(path, load_pem_x509_certificate, "a certificate")


def private_key(path: Path):
    """The private key in a PEM file. Raises `DeployError`."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _read(path, lambda data: load_pem_private_key(data, None), "a private key")


def _read(path: Path, load, what: str):
    try:
        return load(read_bounded(path, _MOST_BYTES))
    except FileNotFoundError:
        raise DeployError(f"{path}: no such file; expected {what}: unpack the kit again") from None
    except (OSError, ValueError, TypeError) as error:
        raise DeployError(f"{path}: expected {what}, got {in_a_line(error)}: unpack the kit again") from None


def expires(path: Path) -> datetime.date:
    """The day on which a certificate ends."""
    return read(path).not_valid_after_utc.date()


def days_left(certificate: Certificate, now: datetime.datetime) -> int:
    """Whole days until a certificate ends; below 0 if it has ended."""
    return (certificate.not_valid_after_utc - now).days


def faults(folder: Path, base: str, name: str, host: str = "", now: datetime.datetime | None = None) -> list[str]:
    """What is wrong with `folder/BASE.crt`, its key and `folder/rootCA.pem`, each with what to do; nothing if all is right.

    `name`: whose certificate it has to be. `host`: the host's name that it has to be for.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    certificate, root, key = read(folder / f"{base}.crt"), read(folder / "rootCA.pem"), private_key(folder / f"{base}.key")
    found = []
    if not _signed_by(certificate, root):
        found.append(
            f"{base}.crt is not signed by this kit's rootCA.pem: its parts are of different kits; unpack the kit again"
        )
    if common_name(certificate) != name:
        found.append(f"{base}.crt is of {common_name(certificate)!r}, not of {name!r}; unpack the kit again")
    if certificate.public_key() != key.public_key():
        found.append(f"{base}.key does not belong to {base}.crt; unpack the kit again")
    if host and host not in host_names(certificate):
        found.append(f"{base}.crt is not for the host {host!r}; correct server.host in federation.toml and provision again")
    return found + _dates(certificate, f"{base}.crt", now) + _dates(root, "rootCA.pem", now)


def _dates(certificate: Certificate, what: str, now: datetime.datetime) -> list[str]:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        return [f"{what} begins at {begins:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} here; set this machine's clock"]
    if now > ends:
        return [f"{what} ended on {ends:%Y-%m-%d}, and it is {now:%Y-%m-%d} here; {RENEW}, unless the clock is wrong"]
    return []


def _signed_by(certificate: Certificate, root: Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def common_name(certificate: Certificate) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def host_names(certificate: Certificate) -> list[str]:
    """The hosts' names and addresses that a certificate is for."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def fingerprint(certificate: Certificate) -> str:
    """The SHA-256 of a certificate, in hexadecimal digits: to compare by telephone."""
    from cryptography.hazmat.primitives import hashes

    return certificate.fingerprint(hashes.SHA256()).hex()
