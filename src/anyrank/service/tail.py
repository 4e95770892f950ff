"""Follow a log of a run while it is written: each line once, a bounded number of bytes at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from anyrank.files import parse_json
from anyrank.service.reading import Stamp, opened, stamp

LONGEST = 4 << 20  # bytes of a line
_STEP = 256 << 10  # bytes of a turn, unless its first line is longer
_MARK = 64  # bytes before the offset by which a log is known again


class Line(NamedTuple):
    """The object of a line of a log, and the offset of the line's end in bytes."""

    end: int
    row: dict[str, Any]


class Turn(NamedTuple):
    """What one turn gave: the lines that were added, and whether the log was `cut` back or replaced, so that all that was read
    before no longer counts and these lines are the first."""

    lines: list[Line]
    cut: bool


class Tail:
    """The end of the log `folder/name`, which may not be there yet.

    Its last line counts once it has its line end: what a kill cut off, or is being written, is not read. A line that is no
    JSON object, or longer than `LONGEST`, is left out and counted as `damaged`. `offset`: where to begin, which is the end of a
    line; if no line of the log ends there, the first turn says that the log was cut.
    """

    def __init__(self, folder: Path, name: str, offset: int = 0) -> None:
        self._folder, self._name = folder, name
        self.stamp: Stamp | None = None
        self._begin(offset)

    def _begin(self, offset: int = 0) -> None:
        self.offset, self.damaged, self._inside = offset, 0, False
        self._mark = b"\n" if offset else b""  # what stands before the offset
        self._seen = -1  # how far the log was looked at

    @property
    def behind(self) -> bool:
        """Whether there is more in the log than was looked at."""
        return self.stamp is not None and self._seen < self.stamp.size

    def is_cut(self) -> bool:
        """Whether the log no longer begins with what was read of it. Raises what `advance` raises."""
        now = stamp(self._folder, self._name)
        if now is None or now == self.stamp:
            return now is None and self.offset > 0
        with os.fdopen(opened(self._folder, self._name), "rb") as file:
            return not self._goes_on(file)

    def advance(self, most: int = LONGEST) -> Turn:
        """Read on for one turn; a line of `most` bytes is too long. Raises `OSError` for a log that is no regular file, or
        cannot be read."""
        now = stamp(self._folder, self._name)
        if now is None:
            cut, self.stamp = self.offset > 0, None
            self._begin()
            return Turn([], cut)
        if now == self.stamp and now.size == self._seen:
            return Turn([], False)
        with os.fdopen(opened(self._folder, self._name), "rb") as file:
            cut = not self._goes_on(file)
            if cut:
                self._begin()
            file.seek(self.offset)
            data = file.read(min(_STEP, most))
            if len(data) == _STEP < most and b"\n" not in data:
                data += file.read(most - _STEP)
            self.stamp = now
        return Turn(list(self._lines(data, most)), cut)

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether the log still begins with what was read."""
        if os.fstat(file.fileno()).st_size < self.offset:  # no file system seeks to any number
            return False
        file.seek(self.offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _lines(self, data: bytes, most: int) -> Iterator[Line]:
        self._seen = self.offset + len(data)
        end = data.rfind(b"\n") + 1
        if not end and len(data) == most:  # a line of more than a turn: passed over up to its end
            self.damaged += not self._inside
            self._inside, end = True, len(data)
            self._note(data, end)
            return
        if not end:
            return
        at = self.offset
        self._note(data, end)
        lines = data[:end].split(b"\n")[:-1]
        for line in lines:
            at += len(line) + 1
            if self._inside:
                self._inside = False
                continue
            row = _object(line)
            if row is None:
                self.damaged += bool(line.strip())
            else:
                yield Line(at, row)

    def _note(self, data: bytes, end: int) -> None:
        self.offset += end
        self._mark = data[max(0, end - _MARK) : end]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
