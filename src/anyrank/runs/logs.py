"""A log of a run: lines that are only ever added, with the length and digest of what stands in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anyrank.errors import RunError
from anyrank.files import append, cut
from anyrank.runs.names import read_lines

_PIECE = 1 << 20
_REMEDY = "restore the file, or start the run anew in another --out"


class Mark(NamedTuple):
    """How far a log went at a checkpoint: its `length` in bytes, and their `sha256`."""

    length: int
    sha256: str


class Log:
    """A log that is being written. What is in the file when this is made counts as whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._length, self._total = _digest(path, None)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a line for each row; on disk when this returns."""
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        append(self.path, data)
        self._length += len(data)
        self._total.update(data)

    def mark(self) -> Mark:
        return Mark(self._length, self._total.hexdigest())


def check(path: Path, mark: Mark) -> None:
    """Raise `RunError` for a log that does not begin as `mark` has it."""
    length, total = _digest(path, mark.length)
    if length < mark.length:
        raise RunError(f"{path}: expected {mark.length} bytes or more, as the checkpoint has it, got {length}; {_REMEDY}")
    if total.hexdigest() != mark.sha256:
        raise RunError(f"{path}: changed or damaged: its first {mark.length} bytes are not those of the checkpoint; {_REMEDY}")


def cut_to(path: Path, mark: Mark) -> None:
    """Cut a log that was checked back to `mark`."""
    if path.exists():
        cut(path, mark.length)


def mark_of_rounds(path: Path, last: int) -> Mark:
    """The mark of a log after round `last`, if none was taken. Raises `RunError` if a round is missing or out of order."""
    length, rounds = 0, []
    for row in read_lines(path):
        if not isinstance(row.get("round"), int):
            raise RunError(f"{path}: a line has no round; {_REMEDY}")
        rounds.append(row["round"])
    kept = [round for round in rounds if round <= last]
    if sorted(set(kept)) != list(range(1, last + 1)) or kept != sorted(kept) or rounds[: len(kept)] != kept:
        raise RunError(f"{path}: expected lines of all rounds up to {last}, the checkpoint's, in order; {_REMEDY}")
    if kept:
        lines = path.read_bytes().split(b"\n")[: len(kept)]
        length = sum(len(line) + 1 for line in lines)
    return Mark(length, _digest(path, length)[1].hexdigest())


def _digest(path: Path, most: int | None) -> tuple[int, Any]:
    """How many bytes a file has, `most` of them at the most, and their digest. A file that is not there has none."""
    total, length = hashlib.sha256(), 0
    if not os.path.lexists(path):
        return length, total
    if not path.is_file():
        raise RunError(f"{path}: expected a file; {_REMEDY}")
    try:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE if most is None else min(_PIECE, most - length)):
                total.update(piece)
                length += len(piece)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}); correct that and go on by --resume") from None
    return length, total
