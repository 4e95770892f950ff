"""What of privacy belongs to the user: the folder of secrets, files that only their owner can read, and the given seed.

Loads nothing heavy, so that a run folder is checked at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from anyrank.errors import RunError

SEED = "ANYRANK_PRIVACY_SEED"
_LEAST_SEED = 32  # characters, so that the seed cannot be guessed


def key_folder() -> Path:
    """Where keys of unfinished runs are: `$XDG_STATE_HOME/anyrank/privacy`, or `~/.local/state/anyrank/privacy`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "anyrank" / "privacy"


def seed() -> bytes | None:
    """The secret in `$ANYRANK_PRIVACY_SEED`, if it is set. Raises `RunError` for one that could be guessed."""
    given = os.environ.get(SEED)
    if given is not None and len(given) < _LEAST_SEED:
        raise RunError(
            f"${SEED}: expected at least {_LEAST_SEED} random characters, got {len(given)}; try: openssl rand -hex 32"
        )
    return None if given is None else given.encode()


def write_for_owner(path: Path, text: str) -> None:
    """Write a file that only its owner can read, where the system has modes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
