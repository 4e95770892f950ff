"""The digests of what a finished run left, by which a comparison sees whether its files are still the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from anyrank.errors import RunError
from anyrank.files import is_temporary, write_whole_text
from anyrank.runs.names import CHECKPOINT, CONFIG, RESULT, SEAL, read_object

_NOT_SEALED = {SEAL, ".lock", "report.html"}


def write(folder: Path) -> None:
    """Note the digests of all that lies in a run folder, but for its checkpoint, which has its own, and its report."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if name.split("/")[0] not in {CHECKPOINT, *_NOT_SEALED} and not is_temporary(folder / name)]
    digest = _once()
    write_whole_text(folder / SEAL, json.dumps({"files": {name: digest(folder / name) for name in kept}}, indent=2) + "\n")


def fits(folder: Path) -> bool:
    """Whether the files are what they were when the run ended. Without the digests they are not: a run that is continued from
    its last checkpoint writes them again, and trains nothing anew."""
    try:
        noted = read_object(folder / SEAL)["files"]
        digest = _once()
        return bool(noted) and all(digest(folder / name) == was for name, was in noted.items())
    except (OSError, RunError, ValueError, KeyError, TypeError, AttributeError):
        return False


def has(folder: Path, name: str) -> bool:
    """Whether the run left a file of this name, below its folder. Raises `RunError` where that is not noted."""
    files = read_object(folder / SEAL).get("files")
    return isinstance(files, dict) and name in files


def check(folder: Path, names: Iterable[str]) -> None:
    """Raise `RunError` for a file of a finished run, one of `names` below its folder, that is not what the run left."""
    noted = read_object(folder / SEAL).get("files")
    for name in names:
        was = noted.get(name) if isinstance(noted, dict) else None
        if was is None or not (folder / name).is_file() or _digest(folder / name) != was:
            how = "has changed since the run ended" if os.path.lexists(folder / name) else "is missing"
            again = f"anyrank run {folder / CONFIG} --out {folder} --resume writes it again"
            raise RunError(f"{folder / name}: {how}; {'restore it' if (folder / RESULT).is_file() else again}")


def _once() -> Callable[[Path], str]:
    """`_digest`, which reads a file of several names (hard links) once."""
    known: dict[tuple[int, int], str] = {}

    def digest(path: Path) -> str:
        status = os.stat(path)
        place = (status.st_dev, status.st_ino)
        if status.st_nlink < 2:
            return _digest(path)
        if place not in known:
            known[place] = _digest(path)
        return known[place]

    return digest


def _digest(path: Path) -> str:
    if not path.is_file():
        raise OSError(f"{path}: not a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
