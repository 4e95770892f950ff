"""Pictures by number, and the parts of a source of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from anyrank.errors import DataError
from anyrank.files import read_bounded

PICTURE_BYTES = 256 << 20  # of one encoded picture
HELD_OUT = ("test", "validation", "valid", "val")  # usual names of held-out splits, the first that is there


class Pixels(Protocol):
    """Pictures by number, decoded when one is read."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """Picture `i` as uint8 `[h, w]` (grey) or `[h, w, 3]` (colour)."""
        ...

    def raw(self, i: int) -> bytes:
        """What picture `i` is made from: its digest is the picture's."""
        ...

    def where(self, i: int) -> str:
        """Picture `i` in the words of an error."""
        ...


@dataclass(frozen=True, eq=False)
class Concatenated:
    """The pictures of several sources, one after the other."""

    parts: tuple[Pixels, ...]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The number of each part's first picture, and the number of all, `[parts + 1]`."""
        return np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, i: int) -> tuple[Pixels, int]:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part], i - int(self.starts[part])

    def read(self, i: int) -> np.ndarray:
        pixels, own = self._at(i)
        return pixels.read(own)

    def raw(self, i: int) -> bytes:
        pixels, own = self._at(i)
        return pixels.raw(own)

    def where(self, i: int) -> str:
        pixels, own = self._at(i)
        return pixels.where(own)


@dataclass(frozen=True, eq=False)
class Rows:
    """What one part of a source holds: `names` `[n]` are label names, in the order `known` where the source has one."""

    pixels: Pixels
    names: list[str]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    known: tuple[str, ...] = ()


Splits = Mapping[str, Callable[[], Rows]]


def file_bytes(path: Path, limit: int = PICTURE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; `DataError` for anything else."""
    try:
        return read_bounded(path, limit)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
