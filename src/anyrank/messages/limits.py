"""What a frame may hold: names, shapes and JSON within limits, checked when it is written and when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anyrank.errors import FrameError, printable, shortened

MOST_HEADER_BYTES = 1 << 23
# In a header: an empty list or table is two bytes of JSON, and in Python it takes 64 and more.
MOST_LISTS, MOST_TABLES = 1 << 19, 1 << 13
MOST_ARRAYS = 100_000
MOST_DIMENSIONS = 8
LONGEST_NAME = 512
DEEPEST = 16  # levels of lists and tables in the body
LARGEST = 1 << 62  # of an integer, and of an array's bytes


def check_header(text: bytes) -> None:
    """Refuse a header that is too large, or would be once it is decoded."""
    if len(text) > MOST_HEADER_BYTES:
        raise FrameError(f"frame, header: expected at most {MOST_HEADER_BYTES} bytes, got {len(text)}")
    for what, mark, most in (("lists", b"[", MOST_LISTS), ("tables", b"{", MOST_TABLES)):
        if (count := text.count(mark)) > most:
            raise FrameError(f"frame, header: expected at most {most} {what}, got {count}")


def check_name(name: Any) -> None:
    check_text("name of an array", name)
    if not name:
        raise FrameError("frame, name of an array: expected at least one character, got none")


def check_text(what: str, text: Any) -> None:
    if not isinstance(text, str) or len(text) > LONGEST_NAME or printable(text) != text:
        raise FrameError(f"frame, {what}: expected at most {LONGEST_NAME} printable characters, got {told(text)}")


def check_shape(name: str, shape: Any, itemsize: int) -> int:
    """The number of bytes of an array of `shape`."""
    known = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
    if not known or not all(type(side) is int and 0 <= side < LARGEST for side in shape):
        raise FrameError(f"frame, array {name}: expected at most {MOST_DIMENSIONS} sides of at least 0, got {told(shape)}")
    if math.prod(max(side, 1) for side in shape) * itemsize >= LARGEST:  # also where one side is 0: NumPy refuses it
        raise FrameError(f"frame, array {name}: expected less than 2^62 bytes, got {told(shape)}")
    return math.prod(shape) * itemsize


def check_json(body: Mapping[str, Any]) -> None:
    """Refuse what JSON does not hold exactly, or what is nested deeper than `DEEPEST`."""
    waiting: list[tuple[Any, int]] = [(body, 1)]
    while waiting:
        holder, depth = waiting.pop()
        if depth > DEEPEST:
            raise FrameError(f"frame, body: expected at most {DEEPEST} levels, got more")
        if isinstance(holder, Mapping):
            odd = next((key for key in holder if not isinstance(key, str)), "")
            if odd != "":
                raise FrameError(f"frame, body: expected names as keys, got {told(odd)}")
        for value in holder.values() if isinstance(holder, Mapping) else holder:
            if isinstance(value, (Mapping, list, tuple)):
                waiting.append((value, depth + 1))
            elif not _is_plain(value):
                expected = "text, finite numbers below 2^62, true, false or null"
                raise FrameError(f"frame, body: expected {expected}, got {told(value)}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (str, bool)) or value is None:
        return True
    if isinstance(value, int):
        return -LARGEST < value < LARGEST
    return isinstance(value, float) and math.isfinite(value)


def told(value: Any) -> str:
    """Somebody else's value as an error shows it."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}" if len(value) > MOST_DIMENSIONS else shortened(_plainly(value), 100)
    return shortened(_plainly(value), 100)


def _plainly(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of thousands of digits, and no list of a thousand levels
        return f"a {type(value).__name__} that is too long to show"
