"""Frames: a JSON header and flat NumPy arrays in one block of bytes. This module needs no torch.

    magic     7 bytes, `ANYRANK`
    version   1 byte
    lengths   two unsigned 64-bit integers, little-endian: bytes of the header, and of all arrays together
    header    JSON in UTF-8: `{"kind", "run", "round", "client", "body", "arrays": [[name, dtype, shape], ...]}`
    arrays    in the order of the header, each in C order, little-endian, without gaps
    digest    SHA-256 of everything before it, 32 bytes

The digest finds damage. It does not say who wrote the frame: that is the task of the connection. It stands at the end, so
that a frame is hashed while it is sent, in one pass.

`bfloat16`, which NumPy lacks, is held as `uint16` numbers with the same bits; `Frame.bfloat16` names these arrays.

What is received is checked against limits before it is decoded, and memory is allocated only as bytes arrive: a frame that
announces more than it has costs no more than it has. How long a stream may take is for the caller to limit.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from anyrank.errors import FrameError, printable, shortened
from anyrank.messages.limits import (
    LARGEST,
    MOST_ARRAYS,
    MOST_HEADER_BYTES,
    check_header,
    check_json,
    check_name,
    check_shape,
    check_text,
    told,
)

VERSION = 1
DTYPES = {
    **{name: np.dtype(name).newbyteorder("<") for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16")},
    **{name: np.dtype(name).newbyteorder("<") for name in ("uint32", "uint64", "float16", "float32", "float64")},
    "bfloat16": np.dtype("<u2"),
}

_MAGIC = b"ANYRANK"
_PREFIX = struct.Struct("<7sBQQ")
_DIGEST_BYTES = 32
_PIECE = 1 << 18  # bytes that are read, hashed or written at a time: they stay in the processor's cache
_KEYS = ("kind", "run", "round", "client", "body", "arrays")


class Readable(Protocol):
    """A blocking binary stream: a file, a pipe, `socket.makefile("rb")`."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Writable(Protocol):
    """A blocking binary stream: a file, a pipe, `socket.makefile("wb")`."""

    def write(self, data: memoryview, /) -> int | None: ...


@dataclass(frozen=True)
class Header:
    """What a frame is: its `kind`, the `run`, `round` and `client` that it belongs to, and a `body` that JSON can hold."""

    kind: str
    run: str = ""
    round: int = 0
    client: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("kind", "run", "client"):
            check_text(name, getattr(self, name))
        if type(self.round) is not int or not 0 <= self.round < LARGEST:
            raise FrameError(f"frame, round: expected a whole number of at least 0, got {told(self.round)}")
        if not isinstance(self.body, Mapping):
            raise FrameError(f"frame, body: expected a table, got {told(self.body)}")
        check_json(self.body)


class Later(NamedTuple):
    """An array that is made when it is written, and not held: its type by the name that a frame has for it, its shape, and the
    function that makes it."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def made(self) -> np.ndarray:
        array = self.make()
        if array.shape != self.shape or array.dtype.newbyteorder("<") != DTYPES[self.dtype]:
            raise FrameError(f"frame: expected an array of {self.dtype} {list(self.shape)}, got {array.dtype} {array.shape}")
        return array


@dataclass(frozen=True, eq=False)
class Frame:
    """A header and named arrays of any shape. `bfloat16`: names of the `uint16` arrays whose bits are bfloat16 numbers.

    In a frame that is only written, arrays may be `Later`. Raises `FrameError` for names or arrays that a frame cannot hold.

    >>> frame = Frame(Header("example", round=3), {"A": np.ones((2, 3), np.float32)})
    >>> from_bytes(to_bytes(frame), limit=1000).arrays["A"].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    header: Header
    arrays: Mapping[str, np.ndarray | Later]
    bfloat16: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if len(self.arrays) > MOST_ARRAYS:
            raise FrameError(f"frame: expected at most {MOST_ARRAYS} arrays, got {len(self.arrays)}")
        for name, array in self.arrays.items():
            check_name(name)
            if type(array) is Later:
                check_shape(name, list(array.shape), DTYPES[array.dtype].itemsize)
                continue
            if type(array) not in (np.ndarray, np.memmap):  # others may hold more than numbers, as a mask
                raise FrameError(f"frame, array {name}: expected a NumPy array, got {type(array).__name__}")
            dtype = self.dtype(name)
            if dtype not in DTYPES or (dtype == "bfloat16" and array.dtype.newbyteorder("=") != np.uint16):
                raise FrameError(f"frame, array {name}: expected one of {', '.join(DTYPES)}, got {array.dtype}")
            check_shape(name, list(array.shape), DTYPES[dtype].itemsize)
            if dtype == "bool" and array.size and (largest := array.view(np.uint8).max()) > 1:
                raise FrameError(f"frame, array {name}: expected bool numbers 0 and 1, got {largest}")
        unknown = sorted(self.bfloat16 - self.arrays.keys())
        if unknown:
            raise FrameError(f"frame, bfloat16: expected names of its arrays, got {told(unknown[0])}")

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays together: the frame without its header."""
        return sum(array.nbytes for array in self.arrays.values())

    def dtype(self, name: str) -> str:
        """The number type of an array, by the name that the header has for it."""
        array = self.arrays[name]
        if type(array) is Later:
            return array.dtype
        return "bfloat16" if name in self.bfloat16 else array.dtype.newbyteorder("=").name


@dataclass(frozen=True, eq=False)
class Relayed(Frame):
    """A frame that is passed on as it came, with its sender's `digest`, which is for its receiver to compare."""

    digest: bytes = b""


# --- writing ---------------------------------------------------------------------------------------------------------


def pieces(frame: Frame) -> Iterator[memoryview]:
    """The bytes of a frame in bounded pieces, without a copy of arrays that are contiguous and little-endian."""
    relayed = isinstance(frame, Relayed)
    digest, header = _Unhashed() if relayed else hashlib.sha256(), _encode(frame)
    for block in (_PREFIX.pack(_MAGIC, VERSION, len(header), frame.array_bytes), header, *frame.arrays.values()):
        block = block.made() if type(block) is Later else block
        data = memoryview(bytes_of(block) if isinstance(block, np.ndarray) else block)
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            digest.update(piece)
            yield piece
    yield memoryview(frame.digest if relayed else digest.digest())


def size_of(frame: Frame) -> int:
    """Bytes of the frame, without making its arrays."""
    return _PREFIX.size + len(_encode(frame)) + frame.array_bytes + _DIGEST_BYTES


def write(stream: Writable, frame: Frame) -> int:
    """Write a frame; returns its number of bytes. An `OSError` of the stream is raised as it is."""
    total = 0
    for piece in pieces(frame):
        total += len(piece)
        while len(piece):
            count = stream.write(piece)
            if not count:
                raise FrameError("frame: expected a blocking stream, got one that takes no bytes now")
            piece = piece[count:]
    return total


def to_bytes(frame: Frame) -> bytes:
    """The frame as bytes."""
    return b"".join(pieces(frame))


def _encode(frame: Frame) -> bytes:
    header = frame.header
    arrays = [[name, frame.dtype(name), list(array.shape)] for name, array in frame.arrays.items()]
    values = (header.kind, header.run, header.round, header.client, dict(header.body), arrays)
    text = json.dumps(dict(zip(_KEYS, values, strict=True)), allow_nan=False, separators=(",", ":"), default=dict).encode()
    check_header(text)
    return text


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of an array `[nbytes]`: its own memory where that is possible."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(stream: Readable, limit: int, last: bool = False) -> Frame:
    """Read one frame of at most `limit` bytes; the arrays own their memory and can be written to.

    The stream is left behind the frame. `last`: nothing may follow it. Raises `FrameError`, in one line, for anything that is
    not one whole, undamaged frame within the limits. An `OSError` of the stream is raised as it is.
    """
    source = Source(stream)
    *parts, size = _parts(source, limit)
    end(source)
    _check_last(stream, size, last)
    return Frame(*parts)


def relay(stream: Readable, limit: int, last: bool = False) -> Relayed:
    """`read`, by who passes the frame on as it is: its digest is kept, and neither computed nor compared."""
    source = Source(stream, hashed=False)
    *parts, size = _parts(source, limit)
    digest = source.take(_DIGEST_BYTES, "the digest").tobytes()
    _check_last(stream, size, last)
    return Relayed(*parts, digest)


def _parts(source: Source, limit: int) -> tuple[Header, dict[str, np.ndarray], frozenset[str], int]:
    """A frame up to its digest, and its bytes with it."""
    header, entries, size = begin(source, limit)
    arrays = {name: _array(source, name, dtype, shape) for name, (dtype, shape) in entries.items()}
    return header, arrays, frozenset(name for name, (dtype, _) in entries.items() if dtype == "bfloat16"), size


def _check_last(stream: Readable, size: int, last: bool) -> None:
    if last and stream.readinto(memoryview(bytearray(1))):
        raise FrameError(f"frame: expected the end after {size} bytes, got more")


def begin(source: Source, limit: int) -> tuple[Header, dict[str, tuple[str, list[int]]], int]:
    """Read a frame of at most `limit` bytes up to its arrays: the header, `{name: (dtype, shape)}` of the arrays, and the
    bytes of the frame."""
    magic, version, header_bytes, array_bytes = _PREFIX.unpack(source.take(_PREFIX.size, "the beginning"))
    if magic != _MAGIC:
        raise FrameError(f"frame: expected the first bytes {_MAGIC!r}, got {magic!r}; this is not a frame")
    if version != VERSION:
        raise FrameError(f"frame: expected version {VERSION}, got {version}; use one version of anyrank on all machines")
    size = _PREFIX.size + header_bytes + array_bytes + _DIGEST_BYTES
    if size > limit:
        raise FrameError(f"frame: expected at most {limit} bytes, got a frame of {size}; raise the limit if it is too low")
    if header_bytes > MOST_HEADER_BYTES:
        raise FrameError(f"frame, header: expected at most {MOST_HEADER_BYTES} bytes, got {header_bytes}")
    return *_decode(source.take(header_bytes, "the header").tobytes(), array_bytes), size


def end(source: Source) -> None:
    """Read a frame's digest, and compare it with that of what was read."""
    expected = source.digest.digest()
    found = source.take(_DIGEST_BYTES, "the digest").tobytes()
    if found != expected:
        shown = f"{expected.hex()[:16]}…, got {found.hex()[:16]}…"
        raise FrameError(f"frame: expected the digest {shown}; it was damaged on its way, send it again")


def from_bytes(data: bytes | bytearray | memoryview, limit: int) -> Frame:
    """The frame that is exactly `data`, copied; as `read` does."""
    return read(_Memory(data), limit, last=True)


class _Memory:
    """Bytes as a stream, without a copy of them."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.left = memoryview(data).cast("B")

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


class _Unhashed:
    """In the place of a digest that nobody needs."""

    def update(self, piece: memoryview) -> None:
        """Nothing."""


class Source:
    """Reads a stream in bounded pieces, and counts what it reads; `hashed`: and hashes it."""

    def __init__(self, stream: Readable, hashed: bool = True) -> None:
        self.stream, self.digest, self.received = stream, hashlib.sha256() if hashed else _Unhashed(), 0

    def take(self, size: int, what: str) -> np.ndarray:
        """The next `size` bytes, `[size]` uint8, in memory that grows with what has been received."""
        held, filled = np.empty(min(size, max(_PIECE, self.received)), np.uint8), 0
        while True:
            self._fill(memoryview(held)[filled:], filled, size, what)
            filled = len(held)
            if filled == size:
                return held
            held.resize(min(size, filled + self.received), refcheck=False)

    def pieces(self, size: int, what: str) -> Iterator[memoryview]:
        """The next `size` bytes in bounded pieces, all in the same memory: each is valid until the next one is read."""
        held = memoryview(bytearray(min(size, _PIECE)))
        for start in range(0, size, _PIECE):
            piece = held[: min(_PIECE, size - start)]
            self._fill(piece, start, size, what)
            yield piece

    def _fill(self, view: memoryview, filled: int, size: int, what: str) -> None:
        at = 0
        while at < len(view):
            piece = view[at : at + _PIECE]
            count = self.stream.readinto(piece)
            if count is None:
                raise FrameError(f"frame, {what}: expected a blocking stream, got one that has no bytes now")
            if not 0 < count <= len(piece):
                raise FrameError(f"frame, {what}: expected {size} bytes, got {filled + at}; it was cut short")
            self.digest.update(piece[:count])
            at += count
        self.received += at


def _array(source: Source, name: str, dtype: str, shape: list[int]) -> np.ndarray:
    return array_of(source.take(math.prod(shape) * DTYPES[dtype].itemsize, f"array {name}"), dtype, shape)


def array_of(data: np.ndarray, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """The array of the bytes `data`, `[n]` uint8, as they stand in a frame."""
    stored = DTYPES[dtype]
    return data.view(stored).reshape(shape).astype(stored.newbyteorder("="), copy=False)


def _decode(data: bytes, array_bytes: int) -> tuple[Header, dict[str, tuple[str, list[int]]]]:
    """The header, and `{name: (dtype, shape)}` of the arrays, which together have exactly `array_bytes`."""
    check_header(data)
    try:
        table = json.loads(data.decode(), object_pairs_hook=_table, parse_constant=_constant)
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8
        raise FrameError(f"frame, header: expected JSON, got {printable(shortened(str(error), 200))}") from None
    if not isinstance(table, dict) or tuple(table) != _KEYS:
        raise FrameError(f"frame, header: expected the keys {', '.join(_KEYS)}, got {told(table)}")
    arrays = table.pop("arrays")
    header = Header(**table)
    if not isinstance(arrays, list) or len(arrays) > MOST_ARRAYS:
        raise FrameError(f"frame, arrays: expected a list of at most {MOST_ARRAYS}, got {told(arrays)}")
    entries: dict[str, tuple[str, list[int]]] = {}
    left = array_bytes
    for entry in arrays:
        if not isinstance(entry, list) or len(entry) != 3:
            raise FrameError(f"frame, arrays: expected [name, dtype, shape], got {told(entry)}")
        name, dtype, shape = entry
        check_name(name)
        if name in entries:
            raise FrameError(f"frame, array {name}: expected one array of that name, got two")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise FrameError(f"frame, array {name}: expected one of {', '.join(DTYPES)}, got {told(dtype)}")
        size = check_shape(name, shape, DTYPES[dtype].itemsize)
        if size > left:
            raise FrameError(f"frame, array {name}: expected at most the {left} bytes that are left, got {size}")
        entries[name], left = (dtype, shape), left - size
    if left:
        raise FrameError(f"frame, arrays: expected {array_bytes} bytes in all, got {array_bytes - left}")
    return header, entries


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key that stands twice in one table")
    return table


def _constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")
