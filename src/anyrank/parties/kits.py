"""A kit: the folder, and the archive, that one party of a federation gets. Made, opened and checked here. No NVFlare here.

`kit.json` says whose it is and the digest of every file in it; `kit.sig` is its signature with the federation's root key. A kit
has exactly the files that its role needs: none of another party, and none that would load code.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from anyrank.config.tables import read_toml
from anyrank.errors import ConfigError, DeployError, in_a_line, shortened
from anyrank.files import make_folder, parse_json, read_bounded, write_whole
from anyrank.parties import certificates, policies
from anyrank.parties.policies import OWNER, RUNNING, SERVER, SITE, STATE, VIEWER

MANIFEST, SIGNATURE = "kit.json", "kit.sig"
SITE_FILE, SITE_EXAMPLE = "local/site.toml", "local/site.example.toml"
LOG_CONFIG = "local/log_config.json.default"
_FORMAT = 1
_MOST_BYTES = 1 << 20  # of one file of a kit
_MOST_ENTRIES = 1_000  # of a folder of a kit
ROLES = (SERVER, SITE, OWNER, VIEWER)
_BASE = {SERVER: "server", SITE: "client", OWNER: "client", VIEWER: "client"}
_CONFIG = {SERVER: "fed_server.json", SITE: "fed_client.json", OWNER: "fed_admin.json", VIEWER: "fed_admin.json"}
_KEYS = {"format": int, "federation": str, "role": str, "name": str, "host": str, "port": int, "sites": list, "files": dict}


@dataclass(frozen=True)
class Kit:
    """A kit at `folder`. `name`: the party's: a site's name, the server's host, or a person. `host`, `port`: of the server.
    `sites`: the names of all sites, for the server and for people; a site is not told of others. `files`: `{path: SHA-256}`."""

    folder: Path
    federation: str
    role: str
    name: str
    host: str
    port: int
    sites: tuple[str, ...]
    files: Mapping[str, str]

    @property
    def base(self) -> str:
        """The name of the kit's certificate, without its ending."""
        return _BASE[self.role]

    @property
    def label(self) -> str:
        """What the party is called in lines for people: the server's name is that of its host."""
        return SERVER if self.role == SERVER else self.name

    @property
    def startup(self) -> Path:
        return self.folder / "startup"

    @property
    def state(self) -> Path:
        return self.folder / STATE

    @property
    def site_file(self) -> Path:
        return self.folder / SITE_FILE


def base_of(role: str) -> str:
    """The name of a role's certificate, without its ending."""
    return _BASE[role]


def members(role: str) -> tuple[str, ...]:
    """The files of a kit of this role, other than its manifest and signature."""
    base = _BASE[role]
    startup = [f"startup/{name}" for name in (f"{base}.crt", f"{base}.key", "rootCA.pem", _CONFIG[role])]
    local = [LOG_CONFIG] if role in RUNNING else ["local/resources.json.default"]
    return (*startup, *local, "readme.txt", *([SITE_EXAMPLE] if role == SITE else []))


# --- making ---------------------------------------------------------------------------------------------------------------


def manifest(facts: Mapping[str, Any], contents: Mapping[str, bytes]) -> bytes:
    """The text of `kit.json`: `facts` by the names of `_KEYS`, and the digest of each file."""
    files = {path: hashlib.sha256(data).hexdigest() for path, data in sorted(contents.items())}
    return (json.dumps({"format": _FORMAT, **facts, "files": files}, indent=2, sort_keys=True) + "\n").encode()


def signature(text: bytes, root_key: Any) -> bytes:
    """The signature of a manifest with the federation's root key, as a line of base64."""
    padding, algorithm = _scheme()
    return base64.b64encode(root_key.sign(text, padding, algorithm)) + b"\n"


def _scheme():
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    return padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256().digest_size), hashes.SHA256()


def archive(path: Path, name: str, contents: Mapping[str, bytes]) -> None:
    """Write `contents` as a compressed tar, below one folder `name`: of mode 0600, and the same bytes for the same contents."""
    held = io.BytesIO()
    with gzip.GzipFile(fileobj=held, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        folders = {str(parent) for each in contents for parent in Path(each).parents if str(parent) != "."}
        for folder in ("", *sorted(folders)):
            entry = tarfile.TarInfo(f"{name}/{folder}".rstrip("/"))
            entry.type, entry.mode = tarfile.DIRTYPE, 0o700
            tar.addfile(entry)
        for each, data in sorted(contents.items()):
            entry = tarfile.TarInfo(f"{name}/{each}")
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))
    write_private(path, held.getvalue())


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""

    def write(file: Path) -> None:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
            opened.write(data)

    write_whole(path, write)


def unpacked(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put `contents` into a kit's folder, of mode 0700; what else lies there stays."""
    for each, data in contents.items():
        make_folder((folder / each).parent, 0o700)
        write_private(folder / each, data)
    folder.chmod(0o700)


# --- opening --------------------------------------------------------------------------------------------------------------


def open_kit(folder: Path, roles: tuple[str, ...] = ROLES) -> Kit:
    """The kit at `folder`, as its manifest describes it. Raises `DeployError` for what is no kit, or one of another role."""
    folder = Path(folder)
    if folder.is_file():
        raise DeployError(f"{folder}: expected a kit's folder, got a file; unpack the archive first: tar -xzf {folder}")
    if not (folder / MANIFEST).is_file():
        what = f"no {MANIFEST} in it" if folder.is_dir() else "no such folder"
        raise DeployError(f"{folder}: {what}; expected a kit, as anyrank deploy provision makes it")
    table = _manifest(folder / MANIFEST)
    kit = Kit(
        folder, *(table[key] for key in ("federation", "role", "name", "host", "port")), tuple(table["sites"]), table["files"]
    )
    if kit.role not in roles:
        raise DeployError(f"{folder}: expected the kit of {_words(roles)}, got that of {_words((kit.role,))} ({kit.name})")
    return kit


def _words(roles: tuple[str, ...]) -> str:
    told = {SERVER: "the server", SITE: "a site", OWNER: "an owner", VIEWER: "a viewer"}
    return " or ".join(told[role] for role in roles)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        table = parse_json(read_bounded(path, _MOST_BYTES))
    except (OSError, ValueError) as error:
        raise DeployError(f"{path}: not readable ({in_a_line(error)}); unpack the kit again") from None
    fits = isinstance(table, dict) and all(type(table.get(key)) is kind for key, kind in _KEYS.items())
    fits = (
        fits and table["role"] in ROLES and all(isinstance(each, str) for each in (*table["sites"], *table["files"].values()))
    )
    if not fits:
        raise DeployError(f"{path}: not the description of a kit; unpack the kit again")
    if table["format"] != _FORMAT:
        raise DeployError(
            f"{path}: made by another version of anyrank (format {table['format']}); provision anew with this one"
        )
    return table


def changes(kit: Kit) -> list[str]:
    """What is not as it was provisioned, each with what to do: nothing for a kit as it should be.

    Files that were changed, that are missing or that do not belong there, a manifest that the federation's root key has not
    signed, and files that other users of this machine can read.
    """
    found = [] if _is_signed(kit) else [f"{MANIFEST} is not signed by this kit's rootCA.pem; unpack the kit again"]
    if set(kit.files) != set(members(kit.role)):
        found.append(f"{MANIFEST} names other files than a kit of its role has; provision anew with this version of anyrank")
    for each, digest in sorted(kit.files.items()):
        if each in members(kit.role) and _digest(kit.folder / each) != digest:
            found.append(f"{each} differs from what was provisioned; unpack the kit again")
    return found + _strangers(kit) + _policy_changes(kit) + _readable(kit)


def _is_signed(kit: Kit) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        given = base64.b64decode(read_bounded(kit.folder / SIGNATURE, _MOST_BYTES), validate=False)
        root = certificates.read(kit.startup / "rootCA.pem")
        root.public_key().verify(given, read_bounded(kit.folder / MANIFEST, _MOST_BYTES), *_scheme())
    except (InvalidSignature, OSError, ValueError, TypeError, AttributeError, DeployError):
        return False
    return True


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bounded(path, _MOST_BYTES)).hexdigest()
    except OSError:
        return ""


def _strangers(kit: Kit) -> list[str]:
    """Files beside those of the kit that NVFlare might load: settings of its own, or code in `local/custom`."""
    own = {*members(kit.role), *policies.files(kit.role, kit.folder), SITE_FILE}
    found = []
    for part in ("startup", "local"):
        try:
            with os.scandir(kit.folder / part) as entries:
                names = sorted(entry.name for entry, _ in zip(entries, range(_MOST_ENTRIES), strict=False))
        except OSError as error:
            found.append(f"{part}/ cannot be looked into ({error.strerror}); unpack the kit again")
            continue
        found += [
            f"{part}/{shortened(name, 100)} is no part of a kit; remove it" for name in names if f"{part}/{name}" not in own
        ]
    return found


def _policy_changes(kit: Kit) -> list[str]:
    found = []
    for each, expected in policies.files(kit.role, kit.folder).items():
        path = kit.folder / each
        if os.path.lexists(path) and _without_place(_table(path)) != _without_place(expected):
            found.append(f"{each} differs from what this version of anyrank writes; remove it, and start writes it anew")
    return found


def _table(path: Path) -> Any:
    try:
        return read_toml(path, "file") if path.suffix == ".toml" else parse_json(read_bounded(path, _MOST_BYTES))
    except (OSError, ValueError, ConfigError):
        return None


def _without_place(value: Any) -> Any:
    """`value` with the kit's own place taken out of paths, so that a kit can be moved."""
    if isinstance(value, dict):
        return {key: _without_place(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_place(each) for each in value]
    own = isinstance(value, str) and value.endswith((f"/{STATE}/jobs", f"/{STATE}/snapshots"))
    return value.rpartition(f"/{STATE}/")[2] if own else value


def _readable(kit: Kit) -> list[str]:
    if os.name == "nt":  # where modes do not say who reads
        return []
    key = f"startup/{kit.base}.key"
    try:
        mode = stat.S_IMODE((kit.folder / key).stat().st_mode)
    except OSError:
        return []
    return [f"{key} can be read by others (mode {mode:04o}); chmod 600 {kit.folder / key}"] if mode & 0o077 else []


def check(kit: Kit) -> None:
    """Raise `DeployError` with the first fault of the kit or its certificate: what `start` asks before anything else."""
    host = kit.host if kit.role == SERVER else ""
    found = changes(kit) or certificates.faults(kit.startup, kit.base, kit.name, host)
    if found:
        more = f" ({len(found) - 1} more: anyrank deploy doctor {kit.folder})" if len(found) > 1 else ""
        raise DeployError(f"{kit.folder}: {found[0]}{more}")


def settle(kit: Kit) -> None:
    """Make the kit's state folders, and write its policies for the place where it lies."""
    for name in ("", "tmp", "transfer", *(("jobs", "snapshots", policies.RUNS) if kit.role == SERVER else ())):
        make_folder(kit.state / name, 0o700)
    for each, table in policies.files(kit.role, kit.folder).items():
        text = tomli_w.dumps(table) if each.endswith(".toml") else json.dumps(table, indent=2) + "\n"
        write_private(kit.folder / each, text.encode())
