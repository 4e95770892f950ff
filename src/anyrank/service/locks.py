"""Whether a process holds the lock of a run, seen from outside: to try the lock could make a run fail that takes it then."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from anyrank.runs.lock import LOCK

_TABLE = Path("/proc/locks")
_MOST = 4 << 20  # bytes of the system's table


def held_files() -> frozenset[int] | None:
    """The inode numbers of all files on which a process that this one can see holds a lock; `None` where the system has no
    such table (only Linux has)."""
    if sys.platform != "linux":
        return None
    try:
        with open(_TABLE, "rb") as file:
            rows = file.read(_MOST).decode("ascii", "replace").splitlines()
    except OSError:
        return None
    return frozenset(inode for row in rows if "->" not in row and (inode := _inode(row)) is not None)


def _inode(row: str) -> int | None:
    """The inode of a row such as `1: FLOCK  ADVISORY  WRITE 123 08:01:456 0 EOF`; a row with `->` waits for a lock."""
    place = next((word for word in row.split() if word.count(":") == 2), "")
    inode = place.rpartition(":")[2]
    return int(inode) if inode.isdigit() else None


def is_held(folder: Path, held: frozenset[int] | None) -> bool | None:
    """Whether the lock of the run in `folder` is among the `held` ones; `None` if that cannot be known."""
    if held is None:
        return None
    try:
        return os.lstat(folder / LOCK).st_ino in held
    except OSError:
        return False
