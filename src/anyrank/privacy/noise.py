"""Where the randomness of private training comes from, and where the key of it is kept.

Whoever can draw a run's noise and samples again can take the noise off. They are therefore drawn from a key of the run that
is not in its folder: it lies in the user's own state folder, readable by nobody else, until the run is finished, and is then
deleted. A run that was killed goes on with the same key: the round that is run again releases the very same numbers again,
which tells nobody anything new.
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
from typing import Any, Protocol

import numpy as np

from anyrank import files
from anyrank.errors import RunError
from anyrank.privacy.plan import PrivacyPlan

SEED = "ANYRANK_PRIVACY_SEED"
_LEAST_SEED = 32  # characters: the seed must not be found by trying


class Draws(Protocol):
    """A source of random numbers, drawn one after another."""

    def random(self, size: int) -> np.ndarray:
        """Uniform in [0, 1), float64 `[size]`."""
        ...

    def standard_normal(self, size: int) -> np.ndarray:
        """Standard normal, float64 `[size]`."""
        ...


@dataclass(frozen=True)
class SystemDraws:
    """Numbers from the system's cryptographic source, which nothing can draw again.

    A normal number is the sum of four by Box and Muller, halved, so that its rounding does not give away what it was added to
    (Holohan and Braghin, ESORICS 2021).
    """

    def random(self, size: int) -> np.ndarray:
        words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        return (words >> np.uint64(11)) * 2.0**-53

    def standard_normal(self, size: int) -> np.ndarray:
        radius = np.sqrt(-2 * np.log1p(-self.random(4 * size)))
        return (radius * np.cos(2 * np.pi * self.random(4 * size))).reshape(4, size).sum(axis=0) / 2


@dataclass(frozen=True)
class Mechanism:
    """A plan with the source of its randomness: `key`, or the system's own source where it is `None`."""

    plan: PrivacyPlan
    key: bytes | None = field(default=None, repr=False)

    def draws(self, round: int, client: str) -> Draws:
        """The random numbers of one client in one round. Without the key they cannot be told from chance or guessed.

        Philox takes 128 bits of key; torch's own generator would keep 32 bits of its seed, which can be tried out.
        """
        if self.key is None:
            return SystemDraws()
        digest = hmac.digest(self.key, f"private\x1f{round}\x1f{client}".encode(), "sha256")
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))


def key_folder() -> Path:
    """Where keys of unfinished runs are: `$XDG_STATE_HOME/anyrank/privacy`, or `~/.local/state/anyrank/privacy`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "anyrank" / "privacy"


def new_key(config: Mapping[str, Any]) -> bytes:
    """A run's key: 32 fresh random bytes, or, if `$ANYRANK_PRIVACY_SEED` is set, what that secret and `config` make.

    With the secret, the same configuration gives the same bytes again; another configuration never gets the same noise.
    """
    seed = os.environ.get(SEED)
    if seed is None:
        return secrets.token_bytes(32)
    if len(seed) < _LEAST_SEED:
        raise RunError(
            f"${SEED}: expected at least {_LEAST_SEED} random characters, got {len(seed)}; try: openssl rand -hex 32"
        )
    return hmac.digest(seed.encode(), json.dumps(config, sort_keys=True).encode(), "sha256")


def name_of(key: bytes) -> str:
    """A name for a key that tells nothing of it."""
    return hashlib.sha256(b"anyrank key name" + key).hexdigest()[:32]


def keep_key(key: bytes) -> str:
    """Store a key for its owner alone; returns its name.

    By the mode of the file where there are modes. On Windows it is the user's profile that others cannot read.
    """
    folder, name = key_folder(), name_of(key)
    files.make_folder(folder, mode=0o700)
    files.sweep(folder)
    files.write_whole(folder / name, lambda path: _write_for_owner(path, key.hex()))
    return name


def _write_for_owner(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def find_key(name: str) -> bytes:
    """The key of that name; `RunError` where it is not here, is not what its name says, or others can read it.

    Who can read it is asked on POSIX alone: the modes that Windows shows say nothing of it.
    """
    path = key_folder() / name
    if not path.is_file():
        raise RunError(
            f"{path}: the noise key of this run is not here, so that an interrupted round cannot be run again with the same "
            "noise; bring the key from where the run began, or start the run anew in another --out"
        )
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise RunError(f"{path}: others can read this noise key; expected mode 600, and a run that is started anew")
    try:
        key = bytes.fromhex(path.read_text(encoding="utf-8"))
    except ValueError:
        key = b""
    if name_of(key) != name:
        raise RunError(f"{path}: is not the noise key that this run began with; start the run anew in another --out")
    return key


def forget_key(name: str) -> None:
    """Delete the key of a run that is finished."""
    files.remove(key_folder() / name)
