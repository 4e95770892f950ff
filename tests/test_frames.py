"""Frames: what is written is read bit for bit; what is damaged, boasts or breaks a limit is refused in a line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hostile_frames as hostile
from anyrank.errors import FrameError, printable
from anyrank.messages import frame as framing
from anyrank.messages import limits
from anyrank.messages.frame import DTYPES, Frame, Header, from_bytes, read, relay, to_bytes, write

LIMIT = 1 << 30
MEGABYTE = 1 << 20


def bits(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def assert_same(one: Frame, other: Frame) -> None:
    assert one.header == other.header
    assert list(one.arrays) == list(other.arrays)
    assert one.bfloat16 == other.bfloat16
    for name, array in one.arrays.items():
        got = other.arrays[name]
        assert got.dtype.name == array.dtype.name
        assert got.shape == array.shape
        assert bits(got) == bits(array)


# --- what is written is read -----------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda a: a,
    "columns first": np.asfortranarray,
    "reversed": lambda a: a[::-1] if a.ndim else a,
    "every second": lambda a: a[..., ::2] if a.ndim else a,
    "turned": lambda a: a.T,
    "repeated": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, str]:
    """An array of any type, shape, bits and layout, and its type's name."""
    kind = draw(st.sampled_from(sorted(DTYPES)))
    dtype = DTYPES[kind]
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if kind == "bool":
        data = bytes(byte & 1 for byte in data)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](np.frombuffer(data, dtype).reshape(shape)), kind


PRINTABLE = st.text(max_size=20).filter(lambda text: printable(text) == text)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62) + 1, 2**62 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(PRINTABLE.filter(bool), arrays(), max_size=4),
    st.builds(
        Header, PRINTABLE, PRINTABLE, st.integers(0, 2**60), PRINTABLE, st.dictionaries(st.text(max_size=5), JSON, max_size=3)
    ),
    st.integers(1, 40),
)
def test_what_is_written_is_read_bit_for_bit(named: dict[str, tuple[np.ndarray, str]], header: Header, at_a_time: int) -> None:
    frame = Frame(
        header, {n: a for n, (a, _) in named.items()}, frozenset(n for n, (_, kind) in named.items() if kind == "bfloat16")
    )
    data = to_bytes(frame)
    for got in (from_bytes(data, len(data)), read(Slow(data, at_a_time), len(data), last=True)):
        assert_same(frame, got)
        assert all(array.flags.writeable and array.flags.aligned for array in got.arrays.values())
        assert to_bytes(got) == data
    assert to_bytes(relay(Slow(data, at_a_time), len(data), last=True)) == data
    assert frame.array_bytes == sum(math.prod(a.shape) * DTYPES[kind].itemsize for a, kind in named.values())
    kinds = {name: kind for name, (_, kind) in named.items()}
    assert {name: frame.dtype(name) for name in frame.arrays} == kinds


class Slow(io.RawIOBase):
    """A stream that gives and takes a few bytes at a time."""

    def __init__(self, data: bytes, at_a_time: int) -> None:
        self.data, self.at_a_time, self.taken = memoryview(data), at_a_time, bytearray()

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.at_a_time, len(self.data))
        buffer[:count], self.data = self.data[:count], self.data[count:]
        return count

    def write(self, data: Any) -> int:
        count = min(len(data), self.at_a_time)
        self.taken += data[:count]
        return count


def test_every_bfloat16_is_itself_after_the_way() -> None:
    """All 65,536 patterns, infinities and NaN with their payloads among them."""
    frame = Frame(Header("x"), {"all": np.arange(1 << 16, dtype=np.uint16)}, frozenset({"all"}))
    got = from_bytes(to_bytes(frame), LIMIT)
    np.testing.assert_array_equal(got.arrays["all"], np.arange(1 << 16))
    assert got.dtype("all") == "bfloat16"
    assert from_bytes(to_bytes(Frame(frame.header, frame.arrays)), LIMIT).dtype("all") == "uint16"


def test_frames_follow_one_another_on_a_stream() -> None:
    first, second = (Frame(Header("x", round=n), {"a": np.full(n, n)}) for n in (1, 2))
    stream = io.BytesIO()
    assert write(stream, first) + write(stream, second) == len(stream.getvalue())
    stream.seek(0)
    assert_same(read(stream, LIMIT), first)
    assert_same(read(stream, LIMIT, last=True), second)
    slow = Slow(b"", 3)
    assert write(slow, first) == len(to_bytes(first))
    assert bytes(slow.taken) == to_bytes(first)


def test_the_layout_is_the_one_that_is_documented() -> None:
    """Put together by hand, so that a change of the format does not pass as the same version."""
    frame = Frame(Header("k", "r", 3, "c", {"b": 1}), {"x": np.array([1, -2], np.int16)})
    header = b'{"kind":"k","run":"r","round":3,"client":"c","body":{"b":1},"arrays":[["x","int16",[2]]]}'
    data = b"ANYRANK\x01" + len(header).to_bytes(8, "little") + (4).to_bytes(8, "little") + header + b"\x01\x00\xfe\xff"
    assert to_bytes(frame) == data + hashlib.sha256(data).digest()


def test_a_process_without_torch_reads_and_writes() -> None:
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
from anyrank.messages import frame
made = frame.Frame(frame.Header("x"), {"a": np.ones(3, np.uint16)}, frozenset({"a"}))
print(frame.from_bytes(frame.to_bytes(made), 1000).dtype("a"), *(name for name in sys.modules if name.startswith("torch.")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("bfloat16\n", "")


# --- what is damaged is refused --------------------------------------------------------------------------------------

SMALL = to_bytes(Frame(Header("k", "r", 3, "c", {"b": [1.5]}), {"x": np.ones((2, 1), np.float32), "m": np.array([True])}))


def refused(data: bytes, reason: str | None = None, limit: int = LIMIT) -> str:
    with pytest.raises(FrameError, match=reason) as refusal:
        from_bytes(data, limit)
    told = str(refusal.value)
    assert told == printable(told)
    assert len(told) < 2500
    return told


def test_every_flipped_bit_is_refused() -> None:
    for place in range(len(SMALL)):
        for bit in range(8):
            flipped = bytearray(SMALL)
            flipped[place] ^= 1 << bit
            refused(bytes(flipped))


def test_every_flipped_bit_is_refused_behind_one_that_passes_frames_on() -> None:
    """Who relays a frame compares no digest, and makes no new one that would hide the damage from the receiver."""
    passed = 0
    for place in range(len(SMALL)):
        for bit in range(8):
            flipped = bytearray(SMALL)
            flipped[place] ^= 1 << bit
            with contextlib.suppress(FrameError):
                onward = to_bytes(relay(Slow(bytes(flipped), 7), LIMIT, last=True))
                passed += 1
                assert onward != SMALL
                refused(onward)
    assert passed > 8 * 32  # damage in numbers and in the digest, at the least, is for the receiver to find


def test_every_cut_is_refused() -> None:
    for length in range(len(SMALL)):
        refused(SMALL[:length], "cut short|expected JSON")
        with pytest.raises(FrameError):
            relay(io.BytesIO(SMALL[:length]), LIMIT, last=True)
        if length:
            refused(SMALL[length:])


@given(st.integers(0, len(SMALL)), st.binary(min_size=1, max_size=40))
def test_every_insertion_is_refused(place: int, inserted: bytes) -> None:
    data = SMALL[:place] + inserted + SMALL[place:]
    if data != SMALL:
        refused(data)


@given(st.integers(0, len(SMALL)), st.integers(0, len(SMALL)), st.binary(max_size=40))
def test_every_replacement_is_refused(start: int, end: int, instead: bytes) -> None:
    data = SMALL[: min(start, end)] + instead + SMALL[max(start, end) :]
    if data != SMALL:
        refused(data)


@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    refused(data)
    refused(SMALL[:24] + data)


@pytest.mark.parametrize("number", range(400))
def test_frames_that_say_something_else_are_taken_or_refused_in_a_line(number: int) -> None:
    assert hostile.frames(hostile.spoiled_frame(random.Random(number))) in ("read", "refused", "refused as a record")


def test_the_hostile_frames_reach_every_reader() -> None:
    """As they are, good frames are read, so that spoiled ones are refused for what is spoiled in them."""
    for good in hostile.good_frames():
        data = to_bytes(good)
        header, arrays = hostile.unsealed(data)
        assert hostile.frames(data) == "read"
        assert hostile.frames(hostile.sealed(json.dumps(header).encode(), arrays)) == "read"
    outcomes = {hostile.frames(hostile.spoiled_frame(random.Random(number))) for number in range(400)}
    assert outcomes == {"read", "refused", "refused as a record"}


# --- what breaks a limit is refused ----------------------------------------------------------------------------------

GOOD = {"kind": "k", "run": "", "round": 0, "client": "", "body": {}, "arrays": []}


def header(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "expected JSON"),
        (b"[]", r"expected the keys kind, run, round, client, body, arrays, got \[\]"),
        (b"null", "got None"),
        (header(more=1), "expected the keys"),
        (json.dumps({k: GOOD[k] for k in reversed(GOOD)}).encode(), "expected the keys"),
        (header().replace(b'"k"', b'"\xff"'), "expected JSON, got 'utf-8' codec"),
        (header().decode().encode("utf-16"), "expected JSON"),
        (header().replace(b'"k"', b'"k","kind":"k"'), "expected JSON, got a key that stands twice"),
        (header().replace(b"{}", b'{"a":{"b":1,"b":1}}'), "a key that stands twice"),
        (header().replace(b"{}", b'{"a":NaN}'), "expected JSON, got NaN"),
        (header().replace(b"{}", b'{"a":-Infinity}'), "expected JSON, got -Infinity"),
        (header().replace(b"{}", b'{"a":1e999}'), "expected text, finite numbers below 2.62, true, false or null, got inf"),
        (header().replace(b"{}", b'{"a":' + b"9" * 3000 + b"}"), "finite numbers"),
        (header().replace(b"{}", b'{"a":' + b"9" * 10_000 + b"}"), "expected JSON, got Exceeds the limit"),
        (header().replace(b"{}", b'{"a":4611686018427387904}'), "finite numbers below 2.62"),
        (header().replace(b"{}", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "expected JSON|levels"),
        (header(body={"a": deep(limits.DEEPEST)}), "body: expected at most 16 levels, got more"),
        (header(body=[]), r"body: expected a table, got \[\]"),
        (header(kind=3), "kind: expected at most 512 printable characters, got 3"),
        (header(run="\x1b[31m"), "run: expected at most 512 printable characters"),
        (header(client="x" * 513), "client: expected at most 512 printable characters, got 'xxx"),
        (header(round=-1), "round: expected a whole number of at least 0, got -1"),
        (header(round=True), "round: expected a whole number of at least 0, got True"),
        (header(round=1.0), "got 1.0"),
        (header(arrays={}), "arrays: expected a list of at most 100000, got {}"),
        (header(arrays=[["x", "int8"]]), r"arrays: expected \[name, dtype, shape\], got \['x', 'int8'\]"),
        (header(arrays=[3]), "got 3"),
        (header(arrays=[["", "int8", [0]]]), "name of an array: expected at least one character"),
        (header(arrays=[[None, "int8", [0]]]), "name of an array: expected at most 512 printable characters, got None"),
        (header(arrays=[["a\n", "int8", [0]]]), "name of an array: expected at most 512 printable characters"),
        (header(arrays=[["\ud800", "int8", [0]]]), "name of an array"),
        (header(arrays=[["x" * 513, "int8", [0]]]), "name of an array"),
        (header(arrays=[["x", "int8", [0]], ["x", "int8", [0]]]), "array x: expected one array of that name, got two"),
        (header(arrays=[["x", "object", [0]]]), "array x: expected one of bool, .*bfloat16, got 'object'"),
        (header(arrays=[["x", ["int8"], [0]]]), r"array x: expected one of bool, .*, got \['int8'\]"),
        (header(arrays=[["x", "<i4", [0]]]), "got '<i4'"),
        (header(arrays=[["x", "int8", 0]]), "expected at most 8 sides of at least 0, got 0"),
        (header(arrays=[["x", "int8", [0] * 9]]), "expected at most 8 sides of at least 0, got a list of 9"),
        (header(arrays=[["x", "int8", [-1]]]), r"sides of at least 0, got \[-1\]"),
        (header(arrays=[["x", "int8", [True]]]), r"got \[True\]"),
        (header(arrays=[["x", "int8", [0.0]]]), r"got \[0.0\]"),
        (header(arrays=[["x", "int8", [2**62]]]), "sides of at least 0, got"),
        (header(arrays=[["x", "float64", [2**61]]]), "expected less than 2.62 bytes"),
        (header(arrays=[["x", "int8", [2**32, 2**32]]]), "expected less than 2.62 bytes"),  # 2^64 is 0 in 64 bits
        (header(arrays=[["x", "int8", [2**61, 0, 2**61]]]), "expected less than 2.62 bytes"),  # NumPy makes no such array
        (header(arrays=[["x", "int8", [9]]]), "array x: expected at most the 8 bytes that are left, got 9"),
        (header(arrays=[["x", "int8", [5]], ["y", "int16", [2]]]), "y: expected at most the 3 bytes that are left, got 4"),
        (header(arrays=[["x", "int8", [7]]]), "arrays: expected 8 bytes in all, got 7"),
        (header(arrays=[["x", "bool", [8]]]), "array x: expected bool numbers 0 and 1, got 7"),
    ],
)  # fmt: skip
def test_a_header_of_another_form_is_refused(text: bytes, reason: str) -> None:
    refused(hostile.sealed(text, bytes(range(8))), reason)


def test_an_empty_array_may_have_any_sides() -> None:
    data = hostile.sealed(header(arrays=[["x", "float64", [0, 2**40]], ["y", "int8", [3, 0]]]), b"")
    assert {name: array.shape for name, array in from_bytes(data, LIMIT).arrays.items()} == {"x": (0, 2**40), "y": (3, 0)}


def test_the_lengths_of_a_frame_are_refused_before_anything_is_read() -> None:
    for limit in (0, len(SMALL) - 1):
        refused(SMALL, f"expected at most {limit} bytes, got a frame of {len(SMALL)}", limit)
    from_bytes(SMALL, len(SMALL))
    refused(hostile.sealed(header(), b"", arrays=2**64 - 1), "expected at most 1073741824 bytes, got a frame of 18446744073709")
    refused(hostile.sealed(header(), b"", header=2**23 + 1), "header: expected at most 8388608 bytes, got 8388609")
    refused(hostile.sealed(header(), b"", version=2), "expected version 1, got 2; use one version of anyrank")
    refused(b"PK\x03\x04" + SMALL[4:], "expected the first bytes b'ANYRANK', got b'PK.*this is not a frame")
    refused(b"", "the beginning: expected 24 bytes, got 0; it was cut short")
    refused(SMALL[:-5], "the digest: expected 32 bytes, got 27; it was cut short")
    refused(SMALL + b"\0", f"expected the end after {len(SMALL)} bytes, got more")


def test_too_many_arrays_are_refused_in_both_directions() -> None:
    many = [[f"{i}", "int8", [0]] for i in range(limits.MOST_ARRAYS + 1)]
    refused(hostile.sealed(header(arrays=many), b""), "arrays: expected a list of at most 100000, got a list of 100001")
    assert len(from_bytes(hostile.sealed(header(arrays=many[1:]), b""), LIMIT).arrays) == limits.MOST_ARRAYS
    with pytest.raises(FrameError, match="expected at most 100000 arrays, got 100001"):
        Frame(Header("k"), {name: np.empty(0, np.int8) for name, *_ in many})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Frame(Header("k"), {"x": np.array([None])}), "array x: expected one of bool, .*, got object"),
        (lambda: Frame(Header("k"), {"x": np.array(["a"])}), "got <U1"),
        (lambda: Frame(Header("k"), {"x": np.ones(1, complex)}), "got complex128"),
        (lambda: Frame(Header("k"), {"x": np.ones(1, "datetime64[s]")}), "got datetime64"),
        (lambda: Frame(Header("k"), {"x": np.ones(1, "i4,f4")}), "array x: expected one of"),
        (lambda: Frame(Header("k"), {"x": np.ones(1, np.int16)}, frozenset("x")), "array x: expected one of .*, got int16"),
        (lambda: Frame(Header("k"), {"x": np.ones(1)}, frozenset("y")), "bfloat16: expected names of its arrays, got 'y'"),
        (lambda: Frame(Header("k"), {"x": [1.0]}), "array x: expected a NumPy array, got list"),
        (lambda: Frame(Header("k"), {"x": np.ma.masked_array([1.0], [True])}), "got MaskedArray"),
        (lambda: Frame(Header("k"), {"x": np.ones((1,) * 9)}), "expected at most 8 sides"),
        (lambda: Frame(Header("k"), {3: np.ones(1)}), "name of an array: .*, got 3"),
        (lambda: Frame(Header("k"), {"a\x00": np.ones(1)}), "name of an array"),
        (lambda: Header("k", body={"a": math.nan}), "got nan"),
        (lambda: Header("k", body={"a": np.float32(1)}), "finite numbers below 2.62, .*, got np.float32|got 1.0"),
        (lambda: Header("k", body={"a": {1}}), "got {1}"),
        (lambda: Header("k", body={"a": {1: 2}}), "expected names as keys, got 1"),
        (lambda: Header("k", body={"a": b"x"}), "got b'x'"),
        (lambda: Header("k", round=-1), "round: expected a whole number"),
        (lambda: Header(None), "kind: expected at most 512 printable characters, got None"),
        (lambda: to_bytes(Frame(Header("k", body={"a": "x" * 2**24}), {})), "header: expected at most 8388608 bytes, got"),
    ],
)  # fmt: skip
def test_what_no_frame_can_hold_is_not_written(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        make()


# --- streams that do as they like ------------------------------------------------------------------------------------


class Lies(io.RawIOBase):
    """A stream that answers with whatever it was made with."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def readinto(self, buffer: Any) -> Any:
        return self.answer

    def write(self, data: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(("answer", "reason"), [(None, "expected a blocking stream"), (-1, "cut short"), (10**9, "cut short")])
def test_a_stream_that_lies_is_refused(answer: Any, reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        read(Lies(answer), LIMIT)


@pytest.mark.parametrize("answer", [None, 0])
def test_a_stream_that_takes_nothing_is_refused(answer: Any) -> None:
    with pytest.raises(FrameError, match="expected a blocking stream"):
        write(Lies(answer), Frame(Header("k"), {}))


def test_an_endless_stream_costs_no_more_than_its_limit() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readinto(self, buffer: Any) -> int:
            start = bytes(framing._PREFIX.pack(b"ANYRANK", 1, 90, 10 * MEGABYTE))[self.given : self.given + len(buffer)]
            buffer[:] = start + b"{" * (len(buffer) - len(start))
            self.given += len(buffer)
            return len(buffer)

    with pytest.raises(FrameError, match="expected JSON"):
        read(Endless(), 100 * MEGABYTE)
    stream = Endless()
    with pytest.raises(FrameError, match="expected at most 1000 bytes, got a frame of"):
        read(stream, 1000)
    assert stream.given == 24


# --- memory ----------------------------------------------------------------------------------------------------------


def peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` holds at one time, as Python and NumPy allocate them."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "arrays", "lengths"),
    [
        (b"{", b"", {"header": 2**23}),
        (header(arrays=[["x", "int8", [2**40]]]), b"", {"arrays": 2**40}),
        (header(arrays=[["x", "float64", [2**20, 2**20]]]), bytes(100), {"arrays": 2**43}),
        (header(arrays=[["x", "int8", [MEGABYTE]], ["y", "int8", [2**40]]]), bytes(MEGABYTE + 5), {"arrays": 2**40 + MEGABYTE}),
        (header(arrays=[[f"{i}", "int8", [2**34]] for i in range(64)]), bytes(100), {"arrays": 2**40}),
    ],
)
def test_a_frame_that_boasts_costs_what_it_has(text: bytes, arrays: bytes, lengths: dict[str, int]) -> None:
    data = hostile.sealed(text, arrays, **lengths)

    def attempt() -> None:
        with pytest.raises(FrameError, match="cut short"):
            from_bytes(data, 2**50)

    attempt()
    assert peak(attempt) < 3 * len(data) + MEGABYTE


@pytest.mark.parametrize("unit", [b"[],", b"[[]],", b'"ab",', b"1.5,", b"{},", b'{"a":1},'])
def test_a_header_costs_a_bounded_multiple_of_its_bytes(unit: bytes) -> None:
    """Small things take many more bytes in Python than in JSON; of empty lists there may be only so many."""
    text = header().replace(b"{}", b'{"a":[' + unit * (3_000_000 // len(unit)) + b"0]}")
    data = hostile.sealed(text, b"")

    def attempt() -> None:
        with contextlib.suppress(FrameError):
            from_bytes(data, LIMIT)

    assert peak(attempt) < 20 * len(text)


def test_a_frame_that_boasts_is_refused_in_little_address_space() -> None:
    """In a process that may not reserve more than 2 GB in all."""
    program = f"""
import resource
from anyrank.errors import FrameError
from anyrank.messages import frame
data = bytes.fromhex({hostile.sealed(header(arrays=[["x", "int8", [2**45]]]), bytes(100), arrays=2**45).hex()!r})
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    frame.from_bytes(data, 2**50)
except FrameError as error:
    print(error)
"""
    if sys.platform != "linux":
        pytest.skip("the limit holds on Linux alone")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "array x: expected 35184372088832 bytes, got" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "shapes", [[(16, 1 << 18)], [(1 << 16,)] * 64, [(1 << 19,)] * 2 + [(7,)] * 1000], ids=["one", "equal", "mixed"]
)
def test_an_honest_frame_is_held_once(shapes: list[tuple[int, ...]]) -> None:
    """Reading takes the memory of the arrays, writing none, beside a piece and the header."""
    frame = Frame(Header("k"), {f"{i}": np.ones(shape, np.float32) for i, shape in enumerate(shapes)})
    data = to_bytes(frame)
    assert frame.array_bytes >= 4 * MEGABYTE
    assert peak(lambda: from_bytes(data, LIMIT)) < 1.1 * frame.array_bytes + MEGABYTE
    with open(os.devnull, "wb", buffering=0) as stream:
        assert peak(lambda: write(stream, frame)) < MEGABYTE
