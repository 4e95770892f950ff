"""Every write of a run: files that appear whole or not at all, lines added to a log, folders. And bounded reads.

What the system refuses (a full disk, a quota, a read-only or broken disk, a folder of another user) is one `RunFailed`, in one
line that names the file and how to continue. What was there before remains.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anyrank import stopping
from anyrank.errors import RunError, RunFailed

_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space in your quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
    errno.EROFS: "make its file system writable",
    errno.EIO: "see to the disk",
}
_WRONG = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # no such place can be
_NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of file systems on which a folder cannot be flushed
DEEPEST = 32  # lists and tables within each other, in what others wrote
_TOO_DEEP = f"lists and tables are nested more than {DEEPEST} deep"
_TEMPORARY = re.compile(r"\.(.+)\.(\d{1,20})\.tmp", re.DOTALL)
_LONG = 3600.0  # seconds after which a temporary file counts as left, on systems that cannot be asked whether its process runs


def reached(what: str, path: Path) -> None:
    """Called before each write event: `folder`, `lock`, `write`, `flush`, `replace`, `cut` or `remove` of `path`.

    A test puts its own in the place of this one, and raises an `OSError` at the event that is to fail.
    """


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an `OSError` of a write of `path` into one line: `RunFailed`, or `RunError` for a place that cannot be."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _WRONG:
            raise RunError(f"{path}: cannot be made ({reason}); choose another place") from None
        remedy = _REMEDIES.get(error.errno, "correct that")
        raise RunFailed(
            f"{path}: cannot be written ({reason}); {remedy} and give the command again, with --resume where a run had begun"
        ) from None


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder, of this mode, and those above it, on disk when this returns."""
    with naming(path):
        if not path.is_dir():
            reached("folder", path)
            new = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(mode, parents=True, exist_ok=True)
            for folder in new:
                flush_folder(folder.parent)


def write_whole(path: Path, write: Callable[[Path], object], before: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then put it in place in one step. Temporary files that
    killed processes left of the same `path` are removed.

    `before`: where the file goes that stood in its place; a kill between the two steps leaves that one alone.
    Windows puts no file in the place of one that is open or mapped: whoever reads a file that is written again copies it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with stopping.unfinished(temporary), naming(path):
            for left in leftovers(path):
                _remove_left(left)
            reached("write", temporary)
            write(temporary)
            reached("flush", temporary)
            with open(temporary, "r+b") as written:  # Windows flushes only what is open for writing
                os.fsync(written.fileno())
            if before and path.exists():
                reached("replace", before)
                os.replace(path, before)
            _replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole_text(path: Path, text: str) -> None:
    """Like `write_whole`, for a text; the bytes are the same on every system: UTF-8 with line feeds."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises `OSError` for a file of more than `limit` bytes, and what `check_regular` raises."""
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(f"expected at most {limit:,} bytes, got {size:,}")
        return file.read(size)


def check_regular(path: Path) -> None:
    """Raise `OSError` unless `path` is a regular file: a read of a pipe may never return, and a device may have no end."""
    try:
        kind = os.stat(path).st_mode
    except ValueError as error:  # a NUL character in the name, for example
        raise FileNotFoundError(f"no file can have this name ({error})") from None
    if not stat.S_ISREG(kind):
        raise OSError(f"expected a file, got {_kind(kind)}")


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def walk(folder: Path, most: int = 10_000_000) -> Iterator[Path]:
    """All that is at any depth below `folder` and is no folder, that of one folder in the order of names.

    Names that begin with a dot are left out, and links to folders are not followed, so that a loop of links has an end. Raises
    `OSError` for a folder that cannot be read, and for more than `most` files and folders.
    """
    waiting, found = [folder], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            inside = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        found += len(inside)
        if found > most:
            raise OSError(f"expected at most {most:,} files and folders")
        folders = [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]
        waiting += map(Path, reversed(folders))
        yield from (path for entry in inside if entry.path not in folders and not (path := Path(entry.path)).is_dir())


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text. Raises `ValueError` for what is no JSON, and for values that `check_depth` refuses."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise `ValueError` for lists and tables that are nested too deep for functions that call themselves for each level."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for each in level if isinstance(each, (dict, list, tuple)) for inner in _inner(each)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def move(path: Path, to: Path) -> None:
    """Put the file `path` in the place of `to`, in one step."""
    with naming(to):
        _replace(path, to)


def append(path: Path, data: bytes) -> None:
    """Add to a file, on disk when this returns. Where that fails, the file is cut back to what it was."""
    with naming(path):
        reached("write", path)
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(data)
                file.flush()
                reached("flush", path)
                os.fsync(file.fileno())
            if not before:  # the file may be new
                flush_folder(path.parent)
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise


def cut(path: Path, length: int) -> None:
    """Cut a file back to its first `length` bytes, on disk when this returns."""
    with naming(path):
        if path.stat().st_size > length:
            reached("cut", path)
            with open(path, "r+b") as file:
                file.truncate(length)
                os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file, if it is there; its name is gone from the disk when this returns."""
    with naming(path):
        if os.path.lexists(path):
            reached("remove", path)
            path.unlink()
            flush_folder(path.parent)


def contents(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where there is none. Raises `RunError` where it cannot be looked into."""
    try:
        return sorted(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise RunError(f"{folder}: cannot be looked into ({error.strerror or error}); choose another place") from None


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `write_whole` fills, or that a killed process left of it.

    >>> is_temporary(Path("run/.summary.json.123.tmp")), is_temporary(Path("run/.mine.tmp"))
    (True, False)
    """
    return bool(_TEMPORARY.fullmatch(path.name))


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder. Those of a process that still runs stay."""
    with naming(folder):
        for path in contents(folder):
            if _is_left(path):
                _remove_left(path)


def leftovers(path: Path) -> list[Path]:
    """The temporary files and folders that killed processes left of `path`; no link, and none of a process that still runs."""
    try:
        beside = list(path.parent.iterdir())
    except OSError:  # there is no such folder, or it may be written and not read
        return []
    return sorted(each for each in beside if _is_left(each) and _TEMPORARY.fullmatch(each.name)[1] == path.name)


def _is_left(path: Path) -> bool:
    if not is_temporary(path) or path.is_symlink():
        return False
    process = int(_TEMPORARY.fullmatch(path.name)[2])
    if os.name == "nt":  # there, a signal of any number would end the process
        return _age_s(path) > _LONG
    return not _is_alive(process)


def _remove_left(path: Path) -> None:
    if path.is_file():
        reached("remove", path)
        path.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # it is gone
        return 0.0


def _replace(path: Path, to: Path) -> None:
    reached("replace", to)
    os.replace(path, to)
    flush_folder(to.parent)


def flush_folder(folder: Path) -> None:
    """Bring a folder's names to disk: without, a file may be whole there and its name not."""
    if os.name == "nt":  # which keeps names by itself, and opens no folder
        return
    reached("flush", folder)
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that this user may write and not read
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(opened)


def _is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine, and is not this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
