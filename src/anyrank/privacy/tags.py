"""Tags of private data: by them, a run sees that its data are still the same, and nobody else can check a guess of them.

A plain digest of a file would do for the run. But whoever reads the run folder, and guesses a row, could verify it by that
digest. A tag is an HMAC with a secret of the user, which is beside the noise keys, in the user's own state folder. Each run
adds a salt of its own, so that the tags of two runs do not say whether their data are the same.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyrank import files
from anyrank.errors import RunError
from anyrank.privacy import owned

_BYTES = 32
_SALT = 16  # bytes
_FILE_BYTES = 1024


@dataclass(frozen=True)
class Tags:
    """How a run makes tags: the user's `secret`, and the run's own `salt`."""

    secret: bytes = field(repr=False)
    salt: str

    def of(self, what: str, digests: Mapping[str, str]) -> str:
        """The tag of `digests`, `{file or part: digest}`, under the name `what`."""
        text = json.dumps([self.salt, what, sorted(digests.items())])
        return hmac.digest(self.secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()

    def table(self) -> dict[str, str]:
        """What the run folder holds of it: the name of the secret, which reveals nothing about it, and the salt."""
        return {"secret": _name_of(self.secret), "salt": self.salt}


def folder() -> Path:
    """Where the user's secret is: `identity`, beside the folder of noise keys."""
    return owned.key_folder().parent / "identity"


def new(config: Mapping[str, Any]) -> Tags:
    """The tags of a new run. If `$ANYRANK_PRIVACY_SEED` is set, its salt follows from that and `config`, as the noise does."""
    seed = owned.seed()
    if seed is None:
        return Tags(_own(), secrets.token_hex(_SALT))
    text = json.dumps(["identity", config], sort_keys=True)
    return Tags(_own(), hmac.digest(seed, text.encode(), "sha256")[:_SALT].hex())


def stored(table: Mapping[str, Any]) -> Tags:
    """The tags of a run, from what its folder holds. Raises `RunError` if the secret is missing, damaged or readable by
    others, and `ValueError` for what `Tags.table` did not write."""
    name, salt = table.get("secret"), table.get("salt")
    if not (isinstance(name, str) and isinstance(salt, str) and len(name) == 32 and name.isalnum()):
        raise ValueError("expected the name of a secret and a salt")
    return Tags(_read(folder() / name), salt)


def _own() -> bytes:
    """The user's secret; made if there is none yet. Of two that were made at the same time, each stays and is found by name."""
    files.make_folder(folder(), mode=0o700)
    for path in sorted(files.contents(folder())):
        if not path.name.startswith("."):
            return _read(path)
    secret = secrets.token_bytes(_BYTES)
    files.write_whole(folder() / _name_of(secret), lambda path: owned.write_for_owner(path, secret.hex()))
    return secret


def _read(path: Path) -> bytes:
    try:
        text = files.read_bounded(path, _FILE_BYTES)
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise RunError(
            f"{path}: the secret by which a private run checks its data cannot be read ({error.strerror or error}); copy it "
            "from the machine where the run started, or start a new run with another --out"
        ) from None
    if os.name == "posix" and mode & 0o077:
        raise RunError(f"{path}: other users can read this secret, expected mode 600; remove it, and start new runs")
    try:
        secret = bytes.fromhex(text.decode())
    except ValueError:
        secret = b""
    if len(secret) != _BYTES or _name_of(secret) != path.name:
        raise RunError(f"{path}: is damaged; restore it, or remove it and start new runs")
    return secret


def _name_of(secret: bytes) -> str:
    return hashlib.sha256(b"anyrank identity secret" + secret).hexdigest()[:32]
