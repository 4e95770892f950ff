"""The lock of a folder: two processes never write one run."""

from __future__ import annotations

import warnings
from pathlib import Path

from anyrank import files
from anyrank.errors import RunError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where it has no lock of the system: `take` says what follows
    from filelock import FileLock, SoftFileLock, Timeout


def take(path: Path) -> FileLock:
    """Take the lock of the folder `path`. Raises `RunError` where another process has it.

    The lock is the system's (`fcntl`, `msvcrt`), which frees it when the process ends, however it ends. Where the system or
    the folder's file system has none, the lock is the file itself: it stays when the process is killed. It names its process,
    and newer versions of filelock take it over where that process is gone from this machine; else the error says to delete it.
    """
    lock = FileLock(path / ".lock", thread_local=False)
    of_the_system = not isinstance(lock, SoftFileLock)
    with files.naming(path / ".lock"):
        files.reached("lock", path / ".lock")
        free = _acquired(lock, 0 if of_the_system else 0.5)
    if not free:
        left = "" if of_the_system else f"; if there is none, it was killed: delete {path / '.lock'}"
        raise RunError(f"{path}: another process is writing this run; wait for it, or choose another --out{left}")
    return lock


def _acquired(lock: FileLock, timeout_s: float) -> bool:
    """Take the lock, unless another process has it. What a killed process left is cleared by one attempt and taken by the
    next."""
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:  # an `OSError`, which says nothing of the disk
        return False
    return True
