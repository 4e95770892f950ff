"""Large replies in a file instead of in memory: received in pieces, checked while they are written, read array by array.

The file has no name (`O_TMPFILE`, or a name that is removed at once), so that it is gone when nothing refers to it any more,
also after a kill, and nobody else can put a link or another file in its place. It belongs to this user, mode 0600.

A frame's digest is compared when the frame has arrived. Each array that lies in the file has a CRC-32 of its own, which is
compared whenever it is read: numbers that the disk has changed between the check and the merge are an error. This module needs
no torch.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anyrank import files
from anyrank.errors import FrameError, RunFailed
from anyrank.messages.frame import DTYPES, Frame, Header, Readable, Source, array_of, begin, bytes_of, end

SMALL = 1 << 20  # bytes of a frame's arrays: up to this, the frame stays in memory
LEAST = 1 << 12  # bytes of an array: smaller ones of a large frame stay in memory, too


class Place(NamedTuple):
    """An array that lies in a spool: its type and shape as a frame names them, where it begins, and the CRC-32 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    at: int
    crc: int


class Spool:
    """One file for arrays, without a name. Several threads may use it. `folder`: where it lies.

    Raises `OSError` where the system refuses the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "replies"  # for messages: no file has this name
        files.reached("write", self.path)
        descriptor = _unnamed(folder)
        self._file = open(descriptor, "r+b", buffering=0, closefd=False)  # noqa: SIM115 - closed with the last reference
        weakref.finalize(self, os.close, descriptor)
        self._lock, self._end = threading.Lock(), 0

    def fresh(self) -> Spool:
        """Another file in the same folder. Raises `RunFailed`, in one line, where the system refuses it."""
        with files.naming(self.path):
            return Spool(self.folder)

    def keep(self, dtype: str, array: np.ndarray) -> Place:
        """Keep an array, whose numbers a frame would call `dtype`. Raises `OSError` where the disk is full."""
        writing = Writing(self, dtype, array.shape)
        writing.add(memoryview(bytes_of(array)))
        return writing.place

    def room(self, size: int) -> int:
        """Where `size` bytes may be written that nobody else writes to."""
        with self._lock:
            start, self._end = self._end, self._end + size
        return start

    def write(self, at: int, piece: memoryview) -> None:
        files.reached("write", self.path)
        while len(piece):
            with self._lock:
                self._file.seek(at)
                count = self._file.write(piece)
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            at, piece = at + count, piece[count:]

    def take(self, place: Place) -> np.ndarray:
        """The array at `place`, in memory of its own. Raises `RunFailed` if its bytes are not those that were kept."""
        held = np.empty(math.prod(place.shape) * DTYPES[place.dtype].itemsize, np.uint8)
        with files.naming(self.path):
            whole = self._read(place.at, memoryview(held))
        if not whole or zlib.crc32(held) != place.crc:
            raise RunFailed(
                f"{self.folder}: a reply on this disk was changed after it was checked; check the disk and give the command "
                "again, with --resume"
            )
        return array_of(held, place.dtype, place.shape)

    def _read(self, at: int, view: memoryview) -> bool:
        """Fill `view`; whether there were as many bytes."""
        while len(view):
            with self._lock:
                self._file.seek(at)
                count = self._file.readinto(view)
            if not count:
                return False
            at, view = at + count, view[count:]
        return True


class Writing:
    """An array that is being written to a spool, in pieces. `add` raises `OSError` where the disk is full."""

    def __init__(self, spool: Spool, dtype: str, shape: Sequence[int]) -> None:
        self._spool, self._at = spool, spool.room(_size(dtype, shape))
        self.place = Place(dtype, tuple(shape), self._at, 0)

    def add(self, piece: memoryview) -> None:
        self._spool.write(self._at, piece)
        self._at += len(piece)
        self.place = self.place._replace(crc=zlib.crc32(piece, self.place.crc))


def _unnamed(folder: Path) -> int:
    """A new file in `folder`, open for reading and writing, that no name leads to."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # not every file system has such files; what else is wrong, the next attempt meets again
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    path = folder / f".replies-{secrets.token_hex(8)}.{os.getpid()}.tmp"  # what a kill leaves of it, the next run sweeps away
    extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_TEMPORARY", 0)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | extra, 0o600)
    if os.name != "nt":  # Windows removes it when it is closed
        os.unlink(path)
    return descriptor


# --- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spooled:
    """A frame whose large arrays lie in `spool`: `arrays` has their places, and the other arrays themselves."""

    header: Header
    arrays: Mapping[str, np.ndarray | Place]
    bfloat16: frozenset[str]
    spool: Spool

    def dtype(self, name: str) -> str:
        """The number type of an array, by the name that the header has for it."""
        array = self.arrays[name]
        if isinstance(array, Place):
            return array.dtype
        return "bfloat16" if name in self.bfloat16 else array.dtype.newbyteorder("=").name


def receive(stream: Readable, limit: int, spool: Callable[[], Spool]) -> Frame | Spooled:
    """Read one frame of at most `limit` bytes, a large one into `spool()`; raises what `frame.read` does.

    Where the disk refuses to keep a reply, the whole frame is read all the same, and the answer is its client's failure: a
    frame of kind `failure`.
    """
    source, into = Source(stream), _Into(spool)
    header, entries, _ = begin(source, limit)
    large = sum(_size(*entry) for entry in entries.values()) > SMALL
    arrays: dict[str, np.ndarray | Place] = {}
    for name, (dtype, shape) in entries.items():
        size, what = _size(dtype, shape), f"array {name}"
        if large and size >= LEAST:
            arrays[name] = into.put(name, dtype, shape, source.pieces(size, what))
        else:
            arrays[name] = array_of(source.take(size, what), dtype, shape)
    end(source)
    if into.refused is not None:
        return failure(header, into.refused)
    bfloat16 = frozenset(name for name, (dtype, _) in entries.items() if dtype == "bfloat16")
    held = {name: each for name, each in arrays.items() if not isinstance(each, Place)}
    small = Frame(header, held, bfloat16 & held.keys())  # with its checks
    return small if into.spool is None else Spooled(header, arrays, bfloat16, into.spool)


class _Into:
    """Where the large arrays of one frame go. What the disk `refused` is kept, and the frame is read to its end."""

    def __init__(self, spool: Callable[[], Spool]) -> None:
        self._make = spool
        self.spool: Spool | None = None
        self.refused: OSError | None = None

    def put(self, name: str, dtype: str, shape: Sequence[int], pieces: Iterable[memoryview]) -> Place:
        writing: Writing | None = None
        for piece in pieces:
            if dtype == "bool" and (largest := np.frombuffer(piece, np.uint8).max()) > 1:
                raise FrameError(f"frame, array {name}: expected bool numbers 0 and 1, got {largest}")
            if self.refused is None:
                try:
                    self.spool = self.spool or self._make()
                    writing = writing or Writing(self.spool, dtype, shape)
                    writing.add(piece)
                except OSError as error:
                    self.refused = error
        return writing.place if writing else Place(dtype, tuple(shape), 0, 0)


def failure(header: Header, error: OSError) -> Frame:
    """The failure of a client whose reply cannot be kept."""
    told = os.strerror(error.errno) if error.errno else str(error)
    values = {"code": "CRASHED", "reason": f"its reply could not be kept on the server's disk ({told}); free space there"}
    return Frame(Header("failure", header.run, header.round, header.client, values), {})


def _size(dtype: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
