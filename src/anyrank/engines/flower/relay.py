"""From a ClientApp to the site's attendant: one question, one reply, over a Unix socket in a private folder. No torch, no flwr.

    length    unsigned 64-bit integer, little-endian: bytes of the table
    table     JSON in UTF-8: the table of `anyrank.remote.parcels` about the frames, with their `sizes`
    frames    one after another, as many bytes as `sizes` says

Both sides read within limits: a table of a few hundred kilobytes, frames as large as the limit that the caller gives, memory
only as bytes arrive, and a time for each piece.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.errors import ConfigError, FrameError
from anyrank.messages.limits import LARGEST
from anyrank.remote.parcels import ABOUT, FRAMES, MOST_FRAMES

SOCKET = "attendant.sock"
PIECE_S = 60.0  # for each piece of a message
_LENGTH = struct.Struct("<Q")
_MOST_TABLE = 1 << 18
_BLOCK = 1 << 23  # bytes of an array at most
_LONGEST_PATH = 100  # bytes of a socket's path; systems take from 104 to 108

Message = Mapping[str, Any]  # the table under ABOUT, arrays [bytes] uint8 of each frame under FRAMES


def listen(folder: Path) -> socket.socket:
    """A socket in `folder`, which is made if need be and which only this user can enter. Raises `ConfigError`."""
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError("this system has no sockets in folders; run the site on Linux or macOS")
    path = address(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder}: expected a folder of this user, got another one; remove it")
    folder.chmod(0o700)
    if _answers(path):
        raise ConfigError(f"{path}: expected one process for a folder, and one is running; end it first")
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(8)
    return made


def address(folder: Path) -> Path:
    """The path of the socket in `folder`. Raises `ConfigError` if it is longer than a system takes."""
    path = folder.absolute() / SOCKET
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"{path}: expected a path of at most {_LONGEST_PATH} bytes for a socket; use a shorter folder")
    return path


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as trial, contextlib.suppress(OSError):
        trial.connect(str(path))
        return True
    return False


def ask(path: Path, question: Message, most: int, seconds: float | None) -> Message:
    """The reply of the attendant at `path`, of at most `most` bytes, within `seconds` (`None`: no limit).

    Raises `FrameError` for what is no reply, and `OSError` if nobody is there or nothing comes in time.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(PIECE_S)
        link.connect(str(path))
        write(link, question)
        link.settimeout(seconds)
        return read(link, lambda table: check_sizes(table, most))


def write(link: socket.socket, message: Message) -> None:
    table = json.dumps(message[ABOUT], allow_nan=False).encode()
    link.sendall(_LENGTH.pack(len(table)) + table)
    for part in message[FRAMES]:
        for block in part:
            link.sendall(block)


def read(link: socket.socket, check: Callable[[Mapping[str, Any]], Sequence[int]]) -> Message:
    """One message. `check` gets its table before any frame is read, and returns their sizes, or raises `FrameError`."""
    (length,) = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    if length > _MOST_TABLE:
        raise FrameError(f"relay: expected a table of at most {_MOST_TABLE} bytes, got {length}")
    try:
        table = json.loads(_exactly(link, length))
    except (ValueError, RecursionError):
        raise FrameError("relay: expected a table in JSON, got something else") from None
    if not isinstance(table, dict):
        raise FrameError(f"relay: expected a table, got {type(table).__name__}")
    return {ABOUT: table, FRAMES: [list(_blocks(link, size)) for size in check(table)]}


def drop(link: socket.socket) -> None:
    """Take what still comes, and forget it, for a while: so that the other side gets to read why it was refused."""
    until, piece = time.monotonic() + PIECE_S, bytearray(1 << 16)
    link.shutdown(socket.SHUT_WR)
    while time.monotonic() < until and link.recv_into(piece):
        pass


def check_sizes(table: Mapping[str, Any], most: int) -> Sequence[int]:
    """The sizes of a table, which may be anything. Raises `FrameError`."""
    sizes = table.get("sizes")
    if not isinstance(sizes, list) or len(sizes) > MOST_FRAMES or not all(type(s) is int and 0 < s < LARGEST for s in sizes):
        raise FrameError(f"relay, sizes: expected a list of at most {MOST_FRAMES} whole numbers above 0, got something else")
    if sum(sizes) > most:
        raise FrameError(f"relay: expected at most {most} bytes, got {sum(sizes)} declared")
    return sizes


def _blocks(link: socket.socket, size: int) -> Iterator[np.ndarray]:
    while size:
        block = np.empty(min(size, _BLOCK), np.uint8)
        _fill(link, memoryview(block))
        size -= len(block)
        yield block


def _exactly(link: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    _fill(link, memoryview(buffer))
    return bytes(buffer)


def _fill(link: socket.socket, buffer: memoryview) -> None:
    while len(buffer):
        count = link.recv_into(buffer)
        if not count:
            raise FrameError("relay: expected more bytes, got the end")
        buffer = buffer[count:]
        link.settimeout(PIECE_S)
