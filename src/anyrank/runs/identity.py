"""What a run began with, noted once: its configuration, and digests of the files that this names. A run continues with the
same ones.

The note is never written again, and each checkpoint has its digest: a checkpoint continues the run that it is of, and no other.

A private run's note has no digests of data, and no names of files below a folder of data: by them, a guess of a row could be
verified. It has tags instead (`anyrank.privacy.tags`), also of what is in memory: base model, examples, and whose they are. It
also has the versions of the packages that compute its releases, because a round that is repeated has the same noise.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
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
from anyrank.privacy import tags
from anyrank.privacy.tags import Tags
from anyrank.runs.matching import check_grown, flat
from anyrank.runs.names import CONFIG, IDENTITY, MOST_BYTES, SUMMARY, read_object

_PIECE = 1 << 20
_MOST = 2 << 30  # bytes of a folder, or file, of which every byte is read
_LISTED = 1000  # files of a folder whose digests are noted one by one
_AGREED = "agreed"  # the entry of what sites agreed on
_CONFIG = "config"  # the entry of the configuration, among those of the keys that name files
_TAGS, _HELD, _VERSIONS = "tags", "held", "versions"  # entries of a private run: how it makes tags, those of what is in memory
_PUBLIC = ("model.path", "model.file", "method.file", "eval.file")  # keys whose files are not private
_COMPUTE = ("anyrank", "torch", "numpy")  # packages that compute what a private run releases
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


def note(folder: Path, config: Config, agreed: Mapping[str, str] | None = None, held: Mapping[str, str] | None = None) -> None:
    """Write down what a run begins with; `agreed`: digests of what its sites have in common; `held`: digests of what a private
    run holds in memory, of which tags are noted."""
    noted = {_CONFIG: tables.identity(config), **_noted(of(config), held, _new_tags(config))}
    noted |= {_AGREED: dict(agreed)} if agreed else {}
    write_whole_text(folder / IDENTITY, json.dumps(noted, indent=2) + "\n")


def origin(config: Config, agreed: Mapping[str, str] | None = None, held: Mapping[str, str] | None = None) -> str:
    """A digest of all that a private run's releases are computed from, for its noise key. Not to be published."""
    whole = [of(config), dict(agreed or {}), dict(held or {}), _versions()]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


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
    stored = read_object(folder / IDENTITY)
    now = _noted(of(config), None, _stored_tags(folder, stored))
    for entry in (_AGREED, _HELD, _VERSIONS):
        stored.pop(entry, None)
        now.pop(entry, None)
    _check_config(folder, stored.pop(_CONFIG, None), config)
    for key in sorted(stored.keys() | now.keys()):
        began, found = (each.get(key, {}) for each in (stored, now))
        if began != found:
            raise _changed(folder, config, key, began, found)


def check_held(folder: Path, config: Config, held: Mapping[str, str] | None) -> None:
    """Raise `RunError` if a private run would continue with other data in memory, another base model or other versions of the
    packages than it began with: its noise would be the same.

    Versions may differ where no round is repeated with the same noise: in a run that is finished, over sites (no `held`), and
    with noise of the system."""
    if not os.path.lexists(folder / IDENTITY):
        return
    stored, over = read_object(folder / IDENTITY), os.path.lexists(folder / SUMMARY)
    if config.privacy.level == "none" or (over and stored.get(_TAGS) is None):
        return
    if stored.get(_TAGS) is None:
        raise RunError(f"{folder}: the private run in it was begun by another version of anyrank; choose another --out")
    now, began = _noted({}, held, _stored_tags(folder, stored)), {}
    for entry in (_HELD, _VERSIONS):
        began[entry] = stored.get(entry, {})
        if not isinstance(began[entry], Mapping):
            raise _damaged(folder)
    for part in sorted(began[_HELD].keys() | now[_HELD].keys()):
        if began[_HELD].get(part) != now[_HELD].get(part):
            raise RunError(
                f"{folder}: the private run in it began with another {part} than it has now; go on with the same, or choose "
                "another --out"
            )
    repeats = held is not None and not config.privacy.secure and not over  # a round has the same noise again
    for package in _COMPUTE if repeats else ():
        if began[_VERSIONS].get(package) != now[_VERSIONS].get(package):
            raise RunError(
                f"{folder}: the private run in it began with {package} {began[_VERSIONS].get(package)}, and this is "
                f"{now[_VERSIONS].get(package)}; go on with that version, or choose another --out"
            )


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


def _noted(files: Mapping[str, Any], held: Mapping[str, str] | None, how: Tags | None) -> dict[str, Any]:
    """The entries of a run: `files`, as `of` has them. Of a private run (`how`), tags stand for the digests of data."""
    if how is None:
        return dict(files)
    tagged = {key: found if key in _PUBLIC else {"": how.of(key, found)} for key, found in files.items()}
    in_memory = {part: how.of(part, {"": digest}) for part, digest in (held or {}).items()}
    return {_TAGS: how.table(), **tagged, _HELD: in_memory, _VERSIONS: _versions()}


def _new_tags(config: Config) -> Tags | None:
    return tags.new(tables.identity(config)) if config.privacy.level != "none" else None


def _stored_tags(folder: Path, noted: Mapping[str, Any]) -> Tags | None:
    """How the run in `folder` makes tags; `None` for one that is not private, or that a version before this one began."""
    table = noted.get(_TAGS)
    if table is None:
        return None
    try:
        return tags.stored(table)
    except (ValueError, AttributeError):
        raise _damaged(folder) from None


def _versions() -> dict[str, str]:
    found = {}
    for package in _COMPUTE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # one that is not installed, but on the path
            found[package] = importlib.metadata.version(package)
    return found


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
