"""What goes over NVFlare between server and site: frames cut into NumPy arrays, and a table about them. No torch, no pickle.

    question   {"version", "number", "site", "kind", "run", "round", "replies", "seconds", "most", "sizes"}    server to site
    reply      {"version", "number", "site", "code", "sizes"}                                                 site to server

`number` counts the questions of a job, so that a reply belongs to one of them; `sizes` are the bytes of each frame. Everything
that was received is checked before it is used: first what was declared, then what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from anyrank.errors import FrameError
from anyrank.messages.frame import Frame, Header, Readable, pieces, to_bytes
from anyrank.messages.limits import LARGEST, check_text, told

VERSION = 1
_BLOCK = 1 << 23  # bytes of an array at most
ABOUT, FRAMES = "anyrank", "frames"  # the two keys of a message
OPEN, ASK = "open", "ask"  # kinds of questions: the first one of a worker, and every other
MOST_FRAMES = 4_096  # of one question or reply
MOST_SECONDS = 10_000_000


class Code(StrEnum):
    """What became of a question at the site. No other word about a failure leaves it."""

    OK = "ok"
    DIED = "died"  # its worker ended
    LATE = "late"  # its worker took too long, and was ended
    CLOSED = "closed"  # its worker has not been opened in this process, or has ended since
    CHANGED = "changed"  # its worker was started anew, and answers the opening otherwise
    REFUSED = "refused"  # the question is wrong, or larger than the site allows
    TOO_LARGE = "too-large"  # the reply is larger than the site allows
    FAILED = "failed"  # anything else; the site's log says what


@dataclass(frozen=True)
class Question:
    """About a question's frames. `seconds`: for each reply, `None` without a limit; `most`: bytes of all replies together."""

    number: int
    site: str
    kind: str
    run: str
    round: int
    replies: int
    seconds: float | None
    most: int
    sizes: Sequence[int]

    def __post_init__(self) -> None:
        _check_common(self)
        if self.kind not in (OPEN, ASK):
            raise FrameError(f"question, kind: expected {OPEN} or {ASK}, got {told(self.kind)}")
        check_text("run", self.run)
        _check_count("round", self.round, 0, LARGEST)
        _check_count("replies", self.replies, 1, MOST_FRAMES)
        _check_count("most", self.most, 1, LARGEST)
        number = isinstance(self.seconds, (int, float)) and not isinstance(self.seconds, bool)
        if self.seconds is not None and not (number and 0 < self.seconds <= MOST_SECONDS):
            raise FrameError(f"question, seconds: expected a number above 0 or null, got {told(self.seconds)}")


@dataclass(frozen=True)
class Reply:
    """About a reply's frames, or why there are none."""

    number: int
    site: str
    code: str
    sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        _check_common(self)
        if self.code not in list(Code):
            raise FrameError(f"reply, code: expected one of {', '.join(Code)}, got {told(self.code)}")
        if (self.code == Code.OK) != bool(self.sizes):
            raise FrameError(
                f"reply, sizes: expected frames with the code {Code.OK} alone, got {len(self.sizes)} with {self.code}"
            )


def _check_common(record: Question | Reply) -> None:
    _check_count("number", record.number, 0, LARGEST)
    check_text("site", record.site)
    if not isinstance(record.sizes, (list, tuple)) or len(record.sizes) > MOST_FRAMES:
        raise FrameError(f"parcel, sizes: expected a list of at most {MOST_FRAMES}, got {told(record.sizes)}")
    for size in record.sizes:
        _check_count("sizes", size, 1, LARGEST)


def _check_count(what: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise FrameError(f"parcel, {what}: expected a whole number from {least} to {most}, got {told(value)}")


_R = TypeVar("_R", Question, Reply)


# --- sending ---------------------------------------------------------------------------------------------------------


def cut(frames: Iterable[Frame]) -> list[list[np.ndarray]]:
    """Each frame as arrays `[bytes]` uint8, which share the memory of the frame's own arrays."""
    return [list(_blocks(frame)) for frame in frames]


def _blocks(frame: Frame) -> Iterator[np.ndarray]:
    """The bytes of a frame, each of its arrays in blocks of `_BLOCK`: NVFlare asks for them one by one."""
    for block in _whole(frame):
        for start in range(0, len(block), _BLOCK):
            yield block[start : start + _BLOCK]


def _whole(frame: Frame) -> Iterator[np.ndarray]:
    """The pieces of a frame that lie in one block of memory, together."""
    block: Any = None
    for piece in pieces(frame):
        if piece.obj is not block:
            block = piece.obj
            yield np.frombuffer(block, np.uint8)


def sizes(parts: Sequence[Sequence[np.ndarray]]) -> list[int]:
    """Bytes of each frame."""
    return [sum(len(piece) for piece in frame) for frame in parts]


def table(about: Question | Reply) -> dict[str, Any]:
    """The table about a message's frames."""
    return {"version": VERSION} | asdict(about) | {"sizes": list(about.sizes)}


def message(about: Question | Reply, parts: Sequence[Sequence[np.ndarray]] = ()) -> dict[str, Any]:
    """The two entries of a message with all of its bytes."""
    return {ABOUT: table(about), FRAMES: [list(part) for part in parts]}


# --- receiving -------------------------------------------------------------------------------------------------------


def about(kind: type[_R], found: Any) -> _R:
    """The record of a message's table. Raises `FrameError` for anything else."""
    if not isinstance(found, Mapping) or found.get("version") != VERSION:
        got = told(found.get("version")) if isinstance(found, Mapping) else type(found).__name__
        raise FrameError(f"parcel: expected version {VERSION}, got {got}; use one version of anyrank on all machines")
    fields = {key: value for key, value in found.items() if key != "version"}
    if fields.keys() != kind.__dataclass_fields__.keys():
        raise FrameError(f"parcel: expected the keys {', '.join(kind.__dataclass_fields__)}, got {told(list(fields))}")
    return kind(**fields)


def check_declared(known: Question | Reply, most: int) -> None:
    """Refuse frames that are declared to be larger than `most` bytes together."""
    if sum(known.sizes) > most:
        raise FrameError(
            f"parcel: expected at most {most} bytes, got {sum(known.sizes)} declared; raise the limit if it is too low"
        )


def check_parts(known: Question | Reply, parts: Any) -> list[list[np.ndarray]]:
    """The frames' arrays, if they are what was declared."""
    if not isinstance(parts, list) or len(parts) != len(known.sizes):
        raise FrameError(f"parcel: expected {len(known.sizes)} frames, got {told(parts)}")
    for size, part in zip(known.sizes, parts, strict=True):
        if not isinstance(part, list) or not all(_is_piece(piece) for piece in part):
            raise FrameError("parcel: expected flat arrays of bytes, got something else")
        if (real := sum(len(piece) for piece in part)) != size:
            raise FrameError(f"parcel: expected the {size} bytes that were declared, got {real}")
    return parts


def _is_piece(piece: Any) -> bool:
    return type(piece) is np.ndarray and piece.dtype == np.uint8 and piece.ndim == 1 and piece.flags.c_contiguous


def plain(frame: Frame) -> bytes:
    """A reply to the opening without what differs between two processes of one site."""
    header = frame.header
    body = {key: value for key, value in header.body.items() if key != "memory"}
    return to_bytes(replace(frame, header=Header(header.kind, header.run, header.round, header.client, body)))


class Stream(Readable):
    """Arrays of bytes as a stream. Each is let go once it is read, so that a frame and its pieces never lie in memory twice."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._left, self._now = parts, memoryview(b"")
        self._left.reverse()

    def readinto(self, buffer: memoryview, /) -> int:
        while not len(self._now):
            if not self._left:
                return 0
            self._now = memoryview(self._left.pop()).cast("B")
        count = min(len(buffer), len(self._now))
        buffer[:count], self._now = self._now[:count], self._now[count:]
        return count


class _Part(Readable):
    """The next `left` bytes of a stream."""

    def __init__(self, stream: Readable, left: int) -> None:
        self._stream, self.left = stream, left

    def readinto(self, buffer: memoryview, /) -> int | None:
        if not self.left:
            return 0
        count = self._stream.readinto(buffer[: self.left])
        self.left -= count or 0
        return count


def frames(known: Question | Reply, stream: Readable, receive: Callable[[Readable], Frame]) -> Iterator[Frame]:
    """The frames of a stream, each with the size that was declared. Before the last one, the stream has ended.

    Raises `FrameError`, also for what `receive` refuses.
    """
    for number, size in enumerate(known.sizes, 1):
        part = _Part(stream, size)
        frame = receive(part)
        if part.left:
            raise FrameError(f"parcel: expected a frame of the {size} bytes that were declared, got one of {size - part.left}")
        if number == len(known.sizes) and stream.readinto(memoryview(bytearray(1))):
            raise FrameError(f"parcel: expected the {sum(known.sizes)} bytes that were declared, got more")
        yield frame
