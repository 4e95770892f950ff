"""The digests of what a finished run left, by which a comparison sees whether its files are still the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from anyrank.errors import RunError
from anyrank.files import is_temporary, write_whole_text
from anyrank.runs.names import CHECKPOINT, SEAL, read_object

_NOT_SEALED = {SEAL, ".lock", "report.html"}


def write(folder: Path) -> None:
    """Note the digests of all that lies in a run folder, but for its checkpoint, which has its own, and its report."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if name.split("/")[0] not in {CHECKPOINT, *_NOT_SEALED} and not is_temporary(folder / name)]
    write_whole_text(folder / SEAL, json.dumps({"files": {name: _digest(folder / name) for name in kept}}, indent=2) + "\n")


def fits(folder: Path) -> bool:
    """Whether the files are what they were when the run ended. Without the digests they are not: a run that is continued from
    its last checkpoint writes them again, and trains nothing anew."""
    try:
        noted = read_object(folder / SEAL)["files"]
        return bool(noted) and all(_digest(folder / name) == digest for name, digest in noted.items())
    except (OSError, RunError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _digest(path: Path) -> str:
    if not path.is_file():
        raise OSError(f"{path}: not a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
