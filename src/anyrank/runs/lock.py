"""The lock of a folder: two processes never write one run, or one comparison."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyrank import files
from anyrank.errors import RunError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where the system has no locks: `take` describes what follows
    from filelock import FileLock, SoftFileLock, Timeout

LOCK = ".lock"


def take(path: Path, what: str = "this run") -> FileLock:
    """Take the lock of the folder `path`, and return it. Raises `RunError` if another process holds it; `what` it writes.

    The lock is the system's (`fcntl`, `msvcrt`), which frees it when the process ends, however it ends. Where the system or
    the folder's file system has none, the lock is the file itself, and stays when the process is killed. It names its process,
    and newer versions of filelock take it over if that process no longer runs on this machine; else the error says to delete
    it.
    """
    lock = FileLock(path / LOCK, thread_local=False)
    of_the_system = not isinstance(lock, SoftFileLock)
    with files.naming(path / LOCK):
        files.reached("lock", path / LOCK)
        free = _acquired(lock, 0 if of_the_system else 0.5)
    if not free:
        left = "" if of_the_system else f"; if there is none, it was killed: delete {path / LOCK}"
        raise RunError(f"{path}: another process is writing {what}; wait for it, or choose another --out{left}")
    return lock


@contextmanager
def holding(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of the folder `path` meanwhile. Raises what `take` raises."""
    lock = take(path, what)
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock, timeout_s: float) -> bool:
    """Whether the lock could be taken. What a killed process left is cleared by the first attempt and taken by the next."""
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:  # an `OSError` that is no error of the disk
        return False
    return True
