"""Read what lies in a run folder without trusting it: regular files alone, no link followed, a bounded number of bytes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from anyrank.files import parse_json

MOST_BYTES = 16 << 20  # of one small file of a run, such as summary.json
# Not blocking: the opening of a pipe would wait for a writer.
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0)
_LINKS = (errno.ELOOP, getattr(errno, "EMLINK", errno.ELOOP))


class Stamp(NamedTuple):
    """Which file it was, how long, and when it was last changed (nanoseconds since 1970): to see whether it is another now."""

    file: int
    size: int
    changed_ns: int


def stamp(folder: Path, name: str) -> Stamp | None:
    """The stamp of what is at `folder/name`, a link itself if it is one; `None` where there is nothing."""
    try:
        found = os.lstat(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


def opened(folder: Path, *parts: str) -> int:
    """A descriptor of the regular file `folder/parts...`, to read from. The caller closes it.

    Neither `folder` nor anything below it may be a link. Raises `OSError` for a link, a pipe, a device or a folder in the
    place of the file, `FileNotFoundError` where there is none, and `ValueError` for a part that is no plain name.
    """
    for part in parts:
        if part in ("", ".", "..") or "/" in part or "\\" in part or "\0" in part:
            raise ValueError(f"expected the name of a file, got {part!r}")
    try:
        file = _opened(folder, parts)
    except OSError as error:
        if error.errno in _LINKS or (error.errno == errno.ENOTDIR and any(map(os.path.islink, _ways(folder, parts)))):
            raise OSError(errno.ELOOP, "a link, which is not followed") from None
        raise
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        raise OSError(errno.EINVAL, f"expected a file, got {_KINDS.get(stat.S_IFMT(mode), 'a device')}")
    return file


_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}


def _opened(folder: Path, parts: tuple[str, ...]) -> int:
    """The same, step by step, so that nobody can put a link in the place of a folder in between."""
    if os.open not in os.supports_dir_fd:
        for way in _ways(folder, parts):
            if os.path.islink(way):
                raise OSError(errno.ELOOP, "a link")
        return os.open(folder.joinpath(*parts), _FILE)
    at = os.open(folder, _FOLDER)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _FOLDER, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(parts[-1], _FILE, dir_fd=at)
    finally:
        os.close(at)


def _ways(folder: Path, parts: tuple[str, ...]) -> list[Path]:
    return [folder.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def read(folder: Path, name: str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises `OSError` for a file of more than `most` bytes, and what `opened` raises."""
    with os.fdopen(opened(folder, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"expected at most {most:,} bytes, got {size:,}")
        return file.read(most)


def read_object(folder: Path, name: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `OSError` as `read` does, and `ValueError` for something else in it."""
    value = parse_json(read(folder, name, most))
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def reason(error: Exception) -> str:
    """Why something could not be read, in a few words."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else "damaged"
