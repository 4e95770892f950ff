"""Files that appear whole or not at all, and files of others, which may be of any kind and size."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from anyrank import stopping


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, flush it to disk, then move it to `path` in one step.

    Windows cannot replace a file that is open or mapped, so a reader of a file that will be rewritten must copy it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with stopping.unfinished(temporary):
        try:
            write(temporary)
            with open(temporary, "r+b") as written:  # Windows flushes only what is open for writing
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole_text(path: Path, text: str) -> None:
    """Like `write_whole`, for a text; the bytes are the same on every system: UTF-8 with line feeds."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises `OSError`, in a line, where it is no file of bytes on a disk (a pipe would be waited for, a
    device has no end) or holds more than `limit` bytes.
    """
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind):
        raise OSError(f"expected a file, got {_kind(kind)}")
    with open(path, "rb") as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise OSError(f"expected at most {limit:,} bytes, got {os.stat(path).st_size:,}")
    return found


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")
