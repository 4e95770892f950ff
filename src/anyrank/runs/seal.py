"""The digests of what a finished run left: whether its files are still what they were."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from anyrank.errors import RunError
from anyrank.files import is_temporary, write_whole_text
from anyrank.runs.names import CHECKPOINT, IDENTITY, SEAL, read_object

_NOT_SEALED = {SEAL, ".lock", "report.html"}


def write(folder: Path) -> None:
    """Note the digests of all that lies in a run folder, but for its checkpoint, which has its own, and its report."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if name.split("/")[0] not in {CHECKPOINT, *_NOT_SEALED} and not is_temporary(folder / name)]
    write_whole_text(folder / SEAL, json.dumps({"files": {name: _digest(folder / name) for name in kept}}, indent=2) + "\n")


def fits(folder: Path) -> bool:
    """Whether the files are what they were.

    A run of a version before notes nothing, and has no identity: nothing can be said against it. One with an identity and no
    digests was stopped just before it wrote them.
    """
    if not os.path.lexists(folder / SEAL):
        return not os.path.lexists(folder / IDENTITY)
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
