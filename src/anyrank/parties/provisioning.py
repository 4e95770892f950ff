"""From `federation.toml` to kits: one folder and one archive a party, with what that party needs and nothing else."""

from __future__ import annotations

import datetime
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from anyrank.config import federation as federations
from anyrank.config.federation import FILE, FederationFile
from anyrank.engines.nvflare.provision import Issued, issue
from anyrank.errors import DeployError, nearest
from anyrank.files import make_folder, read_bounded
from anyrank.parties import certificates, kits, templates
from anyrank.parties.policies import SERVER, SITE

KITS, AUTHORITY, SITES = "kits", "authority", "sites"
ALL = "all"


@dataclass(frozen=True)
class Made:
    """A party's kit as it was provisioned. `state`: new, renewed, changed or unchanged. `until`: the last day of its
    certificate."""

    name: str
    role: str
    folder: Path
    archive: Path
    until: datetime.date
    fingerprint: str
    state: str


def provision(place: Path, renew: Collection[str] = ()) -> tuple[FederationFile, list[Made]]:
    """Make the kits of the federation in the folder `place`. Certificates that were issued stay, but for the names in `renew`
    (`all`: everybody's). A kit's own settings and state are not touched.

    Raises `ConfigError` for `federation.toml`, and `DeployError`.
    """
    federation = federations.load(place)
    parties = dict(_parties(federation))
    for name in renew:
        if name != ALL and name not in parties:
            raise DeployError(f"--renew {name}: no such party in {place / FILE}; {nearest(name, [ALL, *parties])}")
    renewed = set(parties) if ALL in renew else set(renew)
    issued = issue(federation, place / AUTHORITY, renewed)
    make_folder(place / KITS, 0o700)
    return federation, [_make(place, federation, issued, name, role, name in renewed) for name, role in parties.items()]


def _parties(federation: FederationFile) -> Iterator[tuple[str, str]]:
    yield federation.server.host, SERVER
    for name in federation.sites:
        yield name, SITE
    for person in federation.people:
        yield person.name, person.role


def kit_name(name: str, role: str) -> str:
    """The name of a party's kit: the server's is called `server`, whatever its host."""
    return SERVER if role == SERVER else name


def _make(place: Path, federation: FederationFile, issued: Issued, name: str, role: str, renewed: bool) -> Made:
    folder = place / KITS / kit_name(name, role)
    contents = dict(_contents(place, issued, name, role))
    told = [] if role == SITE else list(federation.sites)
    facts = {"federation": federation.name, "role": role, "name": name, "sites": told}
    text = kits.manifest(facts | {"host": federation.server.host, "port": federation.server.port}, contents)
    state = _state(folder, text, renewed)
    whole = contents | {kits.MANIFEST: text}
    whole[kits.SIGNATURE] = _kept_signature(folder, state) or kits.signature(text, issued.root_key)
    kits.unpacked(folder, whole)
    kits.archive(folder.with_name(f"{folder.name}.tar.gz"), folder.name, whole)
    if role == SITE and not (folder / kits.SITE_FILE).exists() and (place / SITES / f"{name}.toml").is_file():
        kits.write_private(folder / kits.SITE_FILE, read_bounded(place / SITES / f"{name}.toml", 1 << 20))
    certificate = certificates.read(folder / "startup" / f"{kits.base_of(role)}.crt")
    until, mark = certificate.not_valid_after_utc.date(), certificates.fingerprint(certificate)
    return Made(name, role, folder, folder.with_name(f"{folder.name}.tar.gz"), until, mark, state)


def _state(folder: Path, text: bytes, renewed: bool) -> str:
    if not (folder / kits.MANIFEST).is_file():
        return "new"
    return "renewed" if renewed else "unchanged" if read_bounded(folder / kits.MANIFEST, 1 << 20) == text else "changed"


def _kept_signature(folder: Path, state: str) -> bytes | None:
    """The signature that an unchanged kit has: signatures of the same text differ, and its archive should not."""
    path = folder / kits.SIGNATURE
    return read_bounded(path, 1 << 16) if state == "unchanged" and path.is_file() else None


def _contents(place: Path, issued: Issued, name: str, role: str) -> Iterator[tuple[str, bytes]]:
    made = {f"startup/{file}": data for file, data in issued.startup.get(name, {}).items()}
    made |= {f"local/{file}": data for file, data in issued.local.get(name, {}).items()}
    made["readme.txt"] = templates.readme(kit_name(name, role), role).encode()
    if role == SITE:
        made[kits.SITE_EXAMPLE] = templates.site_file(name).encode()
    for member in kits.members(role):
        if member not in made:
            raise DeployError(f"{place}: NVFlare made no {member} for {name}; this version of it is not supported")
        yield member, made[member]


def initialise(place: Path, federation: FederationFile) -> list[Path]:
    """Write the files that somebody then edits: `federation.toml`, `sites/NAME.toml` for each site, `run.toml`.

    Raises `DeployError` where one of them is there already: nothing is written then.
    """
    texts = {FILE: templates.federation_file(federation), "run.toml": templates.run_file(federation)}
    texts |= {f"{SITES}/{name}.toml": templates.site_file(name) for name in federation.sites}
    for each in texts:
        if os.path.lexists(place / each):
            raise DeployError(f"{place / each}: exists already, and nothing is overwritten; choose another folder, or edit it")
    for each, text in texts.items():
        make_folder((place / each).parent)
        kits.write_private(place / each, text.encode())
    return [place / each for each in texts]


def former(place: Path, federation: FederationFile) -> list[Path]:
    """Kits in the folder `place` whose party is none of the federation any more."""
    now = {kit_name(name, role) for name, role in _parties(federation)}
    folders = sorted((place / KITS).iterdir()) if (place / KITS).is_dir() else []
    return [each for each in folders if each.is_dir() and (each / kits.MANIFEST).is_file() and each.name not in now]
