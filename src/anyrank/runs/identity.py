"""What a run began with, noted once: its configuration, and digests of the files that this names. A run continues with the
same ones.

The note is never written again, and each checkpoint has its digest: a checkpoint continues the run that it is of, and no other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyrank.config import tables
from anyrank.config.sections import Config
from anyrank.errors import RunError
from anyrank.files import read_bounded, write_whole_text
from anyrank.runs.matching import check_grown, flat
from anyrank.runs.names import CONFIG, IDENTITY, MOST_BYTES, read_object

_PIECE = 1 << 20
_MOST = 2 << 30  # bytes of a folder, or file, of which every byte is read
_LISTED = 1000  # files of a folder whose digests are noted one by one
_AGREED = "agreed"  # the entry of what sites agreed on
_CONFIG = "config"  # the entry of the configuration, among those of the keys that name files
_EMBEDDED = ("digits", "arithmetic")  # sources that come with the package, whatever lies in the working folder


def of(config: Config) -> dict[str, dict[str, str]]:
    """`{key of the configuration: {file below its path: sha256}}` for each key that names a file or folder that is there.

    Regular files alone are read, hidden ones are not, links to files are followed. Of a file, or folder, of more than 2 GB the
    digests are of each file's size, time of change, and first and last MB, so that they take no longer than a run's start.
    Raises `RunError` for a file that cannot be read.
    """
    named = {
        "model.path": config.model.path,
        "model.file": config.model.file,
        "data.source": "" if config.data.source in _EMBEDDED else config.data.source,
        "data.test_source": config.data.test_source,
        "data.partition.file": config.data.partition.file,
        "method.file": config.method.file,
        "eval.file": config.eval.file,
        **config.site_files,
    }
    return {key: found for key, path in named.items() if path and (found := _digests(Path(path)))}


def note(folder: Path, config: Config, agreed: Mapping[str, str] | None = None) -> None:
    """Write down what a run begins with; `agreed`: digests of what its sites have in common."""
    noted = {_CONFIG: tables.identity(config), **of(config), **({_AGREED: dict(agreed)} if agreed else {})}
    write_whole_text(folder / IDENTITY, json.dumps(noted, indent=2) + "\n")


def mark(folder: Path) -> str:
    """The digest of the note, which the run's checkpoints have too. Empty if a version before this one began the run."""
    if not os.path.lexists(folder / IDENTITY):
        return ""
    try:
        return hashlib.sha256(read_bounded(folder / IDENTITY, MOST_BYTES)).hexdigest()
    except OSError as error:
        raise RunError(f"{folder / IDENTITY}: cannot be read ({error.strerror or error}); restore the file") from None


def check(folder: Path, config: Config) -> None:
    """Raise `RunError` that names the first key or file that is not what the run in `folder` began with. A folder of a version
    that noted nothing passes here. Whether a note was removed is seen by the checkpoint."""
    if not os.path.lexists(folder / IDENTITY):
        return
    stored, now = read_object(folder / IDENTITY), of(config)
    stored.pop(_AGREED, None)
    _check_config(folder, stored.pop(_CONFIG, None), config)
    for key in sorted(stored.keys() | now.keys()):
        began, found = (each.get(key, {}) for each in (stored, now))
        if began != found:
            raise _changed(folder, config, key, began, found)


def check_agreed(folder: Path, agreed: Mapping[str, str] | None) -> None:
    """Raise `RunError` if the sites of a run that continues agree on something else than when it began."""
    if not os.path.lexists(folder / IDENTITY):
        return
    stored, now = read_object(folder / IDENTITY).get(_AGREED, {}), agreed or {}
    if not isinstance(stored, Mapping):
        raise _damaged(folder)
    for what in sorted(stored.keys() | now.keys()):
        if stored.get(what) != now.get(what):
            raise RunError(
                f"sites ({what}): have another one than when the run in {folder} began; go on with the same base model and "
                "versions, or choose another --out"
            )


def _check_config(folder: Path, noted: Any, config: Config) -> None:
    """Raise `RunError` for a configuration that is not the one that the run began with: its file was edited since."""
    if noted is None:
        return
    if not isinstance(noted, Mapping):
        raise _damaged(folder)
    stored, now = flat(noted), flat(json.loads(json.dumps(tables.identity(config))))
    rounds = stored.pop("run.rounds", None)
    if not isinstance(rounds, int):
        raise _damaged(folder)
    if now.pop("run.rounds") != rounds:
        check_grown(folder, config.replace(run={"rounds": rounds}), config.run.rounds)
    for key in sorted(stored.keys() | now.keys()):
        if stored.get(key) != now.get(key):
            raise RunError(
                f"{folder / CONFIG}: was edited: the run began with {key} = {stored.get(key)!r}, not {now.get(key)!r}; "
                "restore the file, or choose another --out"
            )


def _damaged(folder: Path) -> RunError:
    return RunError(f"{folder / IDENTITY}: damaged; restore the file, or choose another --out")


def _changed(folder: Path, config: Config, key: str, began: Any, found: Mapping[str, str]) -> RunError:
    if not isinstance(began, Mapping):
        return _damaged(folder)
    name = min(name for name in began.keys() | found.keys() if began.get(name) != found.get(name))
    path = Path(config.site_files.get(key) or functools.reduce(getattr, key.split("."), config)) / name
    how = "is gone" if name not in found else "was not there" if name not in began else "has changed"
    return RunError(
        f"{path} ({key}): {how} since the run in {folder} began; go on with the file as it was, or choose another --out"
    )


def _digests(path: Path) -> dict[str, str]:
    """`{file below path: digest}`, the name empty where `path` is a file."""
    try:
        files = _files(path)
        whole = sum(size for size, _ in files.values()) <= _MOST
        digests = {name: _of_file(path / name, *signs, whole) for name, signs in files.items()}
    except OSError as error:
        at = error.filename or path
        raise RunError(f"{at}: cannot be read ({error.strerror or error}); correct that, and give the command again") from None
    if len(digests) > _LISTED:
        text = "\n".join(f"{name}\0{digest}" for name, digest in digests.items())
        return {"": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()}
    return digests


def _files(path: Path) -> dict[str, tuple[int, int]]:
    """`{file: (size, time of change)}` of the regular files at or below `path`, sorted."""
    found = {}
    names = [""] if not path.is_dir() else []
    for folder, inner, files in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        names += [os.path.relpath(os.path.join(folder, name), path) for name in files if not name.startswith(".")]
    for name in sorted(names):
        try:
            status = os.stat(path / name)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # a hub id, or a link to nothing
            continue
        if stat.S_ISREG(status.st_mode):
            found[Path(name).as_posix() if name else ""] = (status.st_size, status.st_mtime_ns)
    return found


@functools.lru_cache(maxsize=4096)
def _of_file(path: Path, size: int, changed: int, whole: bool) -> str:
    """The digest of a file of this size and time of change; a grid of runs reads each file once."""
    with open(path, "rb") as file:
        if whole:
            return hashlib.file_digest(file, "sha256").hexdigest()
        total = hashlib.sha256(f"{size} {changed}".encode() + file.read(_PIECE))
        file.seek(max(0, size - _PIECE))
        total.update(file.read(_PIECE))
        return total.hexdigest()
