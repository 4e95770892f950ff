"""Certificates and start files for the parties of a federation, by NVFlare's own provisioning, with the root key of a folder.

The folder (`authority`) holds the root's private key and, as NVFlare keeps them, the keys that were issued: nobody but the
owner may read it.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank.config.federation import FederationFile
from anyrank.errors import DeployError, in_a_line
from anyrank.files import make_folder, parse_json, read_bounded, write_whole_text

ORGANISATION = "anyrank"  # one for all: rights do not depend on it
_ROLES = {"owner": "project_admin", "viewer": "member"}
_STATE = "cert.json"
_MOST_BYTES = 1 << 26
_NEEDED = "no NVFlare is installed here; install it with: pip install 'anyrank[nvflare]'"


@dataclass(frozen=True, eq=False)
class Issued:
    """What NVFlare made: `startup` `{party: {file name: bytes}}`, `local` likewise, and the root's private key."""

    startup: Mapping[str, Mapping[str, bytes]]
    local: Mapping[str, Mapping[str, bytes]]
    root_key: Any


def issue(federation: FederationFile, authority: Path, renew: Collection[str] = ()) -> Issued:
    """Issue certificates to all parties of `federation`; those that have one keep it, but for the names in `renew`.

    The root is made the first time. Raises `DeployError` where it has ended, or is of another kind than `federation` asks for.
    """
    try:
        from nvflare.lighter.impl.static_file import StaticFileBuilder
        from nvflare.lighter.impl.workspace import WorkspaceBuilder
        from nvflare.lighter.provisioner import Provisioner
    except ImportError:
        raise DeployError(_NEEDED) from None
    make_folder(authority, 0o700)
    authority.chmod(0o700)
    folder = authority / federation.name
    with _private_files():
        kept = _kept(folder, federation, renew)
        builders = [
            WorkspaceBuilder(["master_template.yml"]),
            StaticFileBuilder(config_folder="config", scheme="http"),
            _certificates(federation),
        ]
        words = _Words()
        try:
            Provisioner(str(authority), builders).provision(_project(federation), logger=words)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise DeployError(f"{authority}: NVFlare cannot provision this federation: {in_a_line(error)}") from None
        if words.errors:
            _restore(folder, kept)
            raise DeployError(f"{authority}: NVFlare cannot provision this federation: {words.errors[0]}")
        made = max(folder.glob("prod_*"), default=None)
        if made is None:
            raise DeployError(f"{folder}: NVFlare made no kits; remove old prod_* folders there, if there are any")
        issued = Issued(_read(made, "startup"), _read(made, "local"), _root_key(folder))
        shutil.rmtree(made)
    (folder / "state" / _STATE).chmod(0o600)
    return issued


@contextmanager
def _private_files() -> Iterator[None]:
    """Files that are made within it can be read by nobody else: NVFlare itself sees to that for keys only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


class _Words:
    """What NVFlare's provisioning says: errors are kept, the rest is not shown."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, text: str) -> None:
        self.errors.append(" ".join(str(text).split()))

    def info(self, text: str) -> None: ...

    warning = debug = info


def _project(federation: FederationFile):
    from nvflare.lighter.entity import Participant, Project

    hosts = list(federation.server.other_hosts)
    place = {"fed_learn_port": federation.server.port} | ({"host_names": hosts} if hosts else {})
    people = [Participant("admin", each.name, ORGANISATION, {"role": _ROLES[each.role]}) for each in federation.people]
    parties = [
        Participant("server", federation.server.host, ORGANISATION, place),
        *(Participant("client", name, ORGANISATION, {"allow_log_streaming": False}) for name in federation.sites),
        *people,
    ]
    return Project(federation.name, "", parties, {"api_version": 3})


def _certificates(federation: FederationFile):
    """NVFlare's builder of certificates, with the days that `federation` says."""
    from nvflare.lighter.impl.cert import CertBuilder

    days = federation.certificates.days

    class Certificates(CertBuilder):
        def _generate_cert(self, *args, ca=False, not_valid_before=None, **options):
            if ca:
                return CertBuilder._generate_cert(*args, ca=True, **options)
            begins = not_valid_before or datetime.datetime.now(datetime.UTC)
            options["not_valid_after"] = min(begins + datetime.timedelta(days=days), self.root_cert.not_valid_after_utc)
            return CertBuilder._generate_cert(*args, not_valid_before=begins, **options)

    return Certificates(root_valid_days=federation.certificates.root_days)


def _kept(folder: Path, federation: FederationFile, renew: Collection[str]) -> bytes | None:
    """Take the parties in `renew` out of what NVFlare has kept, so that it issues them new keys. The file as it was before."""
    from cryptography.x509 import load_pem_x509_certificate

    parties = {federation.server.host, *federation.sites, *(each.name for each in federation.people)}
    path = folder / "state" / _STATE
    if not path.exists():
        return None
    before = read_bounded(path, _MOST_BYTES)
    try:
        held = parse_json(before)
        root = load_pem_x509_certificate(held["root_cert"].encode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeployError(
            f"{path}: damaged ({in_a_line(error)}); restore it, or start a new federation in another folder"
        ) from None
    now = datetime.datetime.now(datetime.UTC)
    if root.not_valid_after_utc <= now:
        raise DeployError(
            f"{path}: the root certificate ended on {root.not_valid_after_utc:%Y-%m-%d}; make a new federation with "
            "anyrank deploy init, and give all parties new kits"
        )
    whole = (root.not_valid_after_utc - root.not_valid_before_utc) == datetime.timedelta(days=federation.certificates.root_days)
    if not whole:
        days = (root.not_valid_after_utc - root.not_valid_before_utc).days
        raise DeployError(
            f"certificates.root_days = {federation.certificates.root_days}: the root certificate was made for {days} days; put "
            f"{days} back, or make a new federation"
        )
    stay = {"root_cert", "root_pri_key", *parties} - {*renew}  # a party that has gone gets new keys if it ever returns
    write_whole_text(path, json.dumps({name: value for name, value in held.items() if name in stay}))
    return before


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


def _restore(folder: Path, kept: bytes | None) -> None:
    if kept is not None:
        write_whole_text(folder / "state" / _STATE, kept.decode())


def _root_key(folder: Path):
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    held = parse_json(read_bounded(folder / "state" / _STATE, _MOST_BYTES))
    return load_pem_private_key(held["root_pri_key"].encode(), None)


def _read(made: Path, part: str) -> dict[str, dict[str, bytes]]:
    """`{party: {file name: bytes}}` of one part of all kits that were made."""
    return {
        party.name: {file.name: read_bounded(file, _MOST_BYTES) for file in sorted((party / part).iterdir()) if file.is_file()}
        for party in sorted(made.iterdir())
        if (party / part).is_dir()
    }
