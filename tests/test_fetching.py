"""Frames that go over NVFlare piece by piece: the same bytes, few pieces in memory on both sides, and whatever a sender does is
the end of one message. With NVFlare's own download service between two cells of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank.errors import FrameError, RunFailed
from anyrank.messages.frame import Frame, Header, Later, read, size_of, to_bytes
from anyrank.remote import parcels
from anyrank.remote.parcels import Reply
from anyrank.worker.supervisor import Late

pytest.importorskip("nvflare")

from nvflare.fuel.f3.cellnet.defs import ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.download_service import DownloadService, ProduceRC

import flare
from anyrank.engines.nvflare import fetching
from flare_cells import Cell

SITE, SERVER = "a.job", "server.job"
MB = 1 << 20


def frame(size: int = 10, number: int = 1) -> Frame:
    return Frame(Header("update", "r", number, "a"), {"x": np.random.default_rng(number).integers(0, 255, size, np.uint8)})


def offered(*frames: Frame, failed: Callable[[Exception], None] = pytest.fail) -> fetching.Offer:
    return fetching.Offer(Cell(SITE), SERVER, frames, failed)


class Fetched:
    """What the server reads under a reference, until the end or an error."""

    def __init__(self, reference: Any, most: int, seconds: float = 60.0, **changed: Any) -> None:
        self.cell = Cell(SERVER, **{key: changed.pop(key) for key in ("lies",) if key in changed})
        self.given_up = threading.Event()
        values = {"source": SITE, "until": time.monotonic() + seconds} | changed
        self.stream = fetching.incoming(self.cell, values["source"], reference, most, values["until"], self.given_up)

    def frames(self, *sizes: int) -> list[bytes]:
        known = Reply(1, "a", "ok", sizes)
        with self.stream as stream:
            return [to_bytes(each) for each in parcels.frames(known, stream, lambda part: read(part, 1 << 30))]


def fetched(*frames: Frame, most: int | None = None, sizes: list[int] | None = None, **changed: Any) -> list[bytes]:
    sizes = [size_of(each) for each in frames] if sizes is None else sizes
    return Fetched(offered(*frames).reference, sum(sizes) if most is None else most, **changed).frames(*sizes)


# --- the same bytes --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=5), st.integers(1, 3000))
def test_what_is_read_is_what_was_offered_whatever_the_pieces(lengths: list[int], least: int) -> None:
    frames = [frame(length, number) for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching.joined, "__defaults__", (least,))
        assert fetched(*frames) == [to_bytes(each) for each in frames]


@pytest.mark.parametrize("size", [4 * MB - 500, 4 * MB, 4 * MB + 1, 9 * MB])
def test_pieces_around_their_size(size: int) -> None:
    assert fetched(frame(size), frame(3, 2)) == [to_bytes(frame(size)), to_bytes(frame(3, 2))]
    pieces = list(fetching.joined([frame(size)]))
    assert all(fetching.PIECE <= len(piece) <= fetching.PIECE + (1 << 18) for piece in pieces[:-1])


# --- memory ----------------------------------------------------------------------------------------------------------


def test_few_pieces_are_made_ahead_of_a_slow_reader() -> None:
    """64 arrays of 1 MB that are made when they are sent: how many there are is how far the sender is ahead. Pieces of 1 MB:
    one is read, one waits, one waits for room, one is under way, and one array is begun; the sender keeps its last piece."""
    made, read_so_far, ahead = [0], [0], []

    def make() -> np.ndarray:
        made[0] += 1
        ahead.append(made[0] - read_so_far[0] // MB)
        return np.ones(MB, np.uint8)

    large = Frame(Header("update", "r", 1, "a"), {f"x{number}": Later("uint8", (MB,), make) for number in range(64)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching.joined, "__defaults__", (MB,))
        with Fetched(offered(large).reference, size_of(large)).stream as stream:
            buffer, started = memoryview(bytearray(MB)), made[0]
            assert started <= 1  # nothing is made before somebody asks
            while count := stream.readinto(buffer):
                read_so_far[0] += count
                if read_so_far[0] < 8 * MB:
                    time.sleep(0.05)  # long enough for a sender that does not wait to make all of them
    assert (made[0], read_so_far[0]) == (64, size_of(large))
    assert max(ahead) <= 7


def test_frames_are_let_go_when_nobody_may_ask_any_more() -> None:
    offer = offered(frame(9 * MB))
    with Fetched(offer.reference, 10 * MB).stream as stream:
        assert stream.readinto(memoryview(bytearray(10))) == 10
        offer.release()
        with pytest.raises(FrameError):
            list(iter(lambda: stream.readinto(memoryview(bytearray(MB))), 0))


def test_a_reader_that_leaves_ends_its_thread() -> None:
    with Fetched(offered(frame(30 * MB)).reference, 40 * MB).stream as stream:
        stream.readinto(memoryview(bytearray(10)))
        thread = stream._thread
        assert thread.is_alive()
    flare.wait_for(lambda: not thread.is_alive(), 30.0)


# --- what a sender may do wrong ----------------------------------------------------------------------------------------

THREE = frame(9 * MB)  # three pieces
Lie = Callable[[int, Message], Message]


def changed(number: int, change: Callable[[Message], Any]) -> Lie:
    """Change the reply to one request."""

    def lies(request: int, reply: Message) -> Message:
        return (change(reply) or reply) if request == number else reply

    return lies


def data(make: Callable[[bytes], Any]) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        reply.payload["data"] = make(reply.payload["data"])

    return change


def flip(piece: bytes) -> bytes:
    return piece[:1000] + bytes([piece[1000] ^ 1]) + piece[1001:]


def first_again() -> Lie:
    kept: list[bytes] = []

    def lies(request: int, reply: Message) -> Message:
        if request <= 2:
            kept.append(reply.payload["data"])
            reply.payload["data"] = kept[0]
        return reply

    return lies


def swapped() -> Lie:
    """The second piece first: the state says the first."""
    pieces = list(fetching.joined([THREE]))

    def lies(request: int, reply: Message) -> Message:
        if request <= 2:
            reply.payload["data"] = pieces[2 - request]
        return reply

    return lies


FAULTS: dict[str, Callable[[], Lie]] = {
    "a damaged piece": lambda: changed(2, data(flip)),
    "a piece twice": first_again,
    "pieces in another order": swapped,
    "a piece that is cut": lambda: changed(2, data(lambda piece: piece[:-1])),
    "a piece with more": lambda: changed(2, data(lambda piece: piece + b"1")),
    "the end too early": lambda: changed(2, lambda reply: make_reply(ReturnCode.OK, body={"status": ProduceRC.EOF})),
    "no end": lambda: (
        lambda request, reply: make_reply(
            ReturnCode.OK, body={"status": ProduceRC.OK, "data": b"1" * MB, "state": {"piece": request}}
        )
    ),
    "empty pieces": lambda: changed(2, data(lambda piece: b"")),
    "text in the place of bytes": lambda: changed(2, data(lambda piece: "text")),
    "a list of pieces": lambda: changed(2, data(lambda piece: [piece])),
    "no piece": lambda: changed(2, lambda reply: make_reply(ReturnCode.OK, body={"status": ProduceRC.OK, "state": {}})),
    "a piece that is too large": lambda: changed(2, data(lambda piece: bytes(17 * MB))),
    "no state": lambda: changed(1, lambda reply: reply.payload.pop("state") and None),
    "another piece's state": lambda: changed(1, lambda reply: reply.payload.update(state={"piece": 2})),
    "a state that is no number": lambda: changed(1, lambda reply: reply.payload.update(state={"piece": "1"})),
    "an error": lambda: changed(2, lambda reply: make_reply(ReturnCode.OK, body={"status": ProduceRC.ERROR})),
    "no table": lambda: changed(2, lambda reply: make_reply(ReturnCode.OK, body=None)),
    "a sender that has gone": lambda: changed(2, lambda reply: make_reply(ReturnCode.TARGET_UNREACHABLE)),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_the_sender_is_an_error_in_a_line(what: str) -> None:
    with pytest.raises(FrameError) as caught:
        fetched(THREE, lies=FAULTS[what]())
    assert "\n" not in str(caught.value)


def test_a_request_that_is_lost_is_asked_again_and_no_byte_is_lost() -> None:
    lost = changed(2, lambda reply: make_reply(ReturnCode.TIMEOUT))
    assert fetched(THREE, lies=lost) == [to_bytes(THREE)]


WRONG: dict[str, Callable[[], Any]] = {
    "more than was declared": lambda: fetched(frame(100), frame(100, 2), sizes=[size_of(frame(100))]),
    "less than was declared": lambda: fetched(frame(100), sizes=[size_of(frame(100)), 50]),
    "frames of other sizes than declared": lambda: fetched(
        frame(100), frame(200, 2), sizes=[size_of(frame(200)), size_of(frame(100))]
    ),
    "no reference": lambda: Fetched(None, 100).frames(100),
    "a list of references": lambda: Fetched([["R1"]], 100).frames(100),
    "a reference without end": lambda: Fetched("R" * 10_000, 100).frames(100),
    "a reference to nothing": lambda: Fetched("R1", 100).frames(100),
    "a reference of another process": lambda: Fetched(offered(frame()).reference, 1000, source="b.job").frames(100),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_was_declared_otherwise_is_refused(what: str) -> None:
    with pytest.raises(FrameError) as caught:
        WRONG[what]()
    assert "\n" not in str(caught.value)


def test_nobody_else_may_ask_and_no_piece_out_of_turn() -> None:
    offer = offered(THREE)
    first = offer.produce(None, SERVER)
    assert (first[0], first[2]) == (ProduceRC.OK, {"piece": 1})
    assert offer.produce(None, SERVER) == first  # a reply that was lost
    assert offer.produce({"piece": 1}, "b.job")[0] == ProduceRC.ERROR
    assert offer.produce({"piece": 2}, SERVER)[0] == ProduceRC.ERROR
    assert offer.produce({"piece": 1}, SERVER)[0] == ProduceRC.OK
    assert offer.produce(None, SERVER)[0] == ProduceRC.ERROR  # let go
    assert offer.produce({"piece": "1"}, SERVER)[0] == ProduceRC.ERROR


def test_what_goes_wrong_while_a_piece_is_made_is_reported_to_the_sender() -> None:
    def broken() -> np.ndarray:
        raise RunFailed("a reply on this disk was changed")

    found: list[Exception] = []
    bad = Frame(Header("download", "r"), {"x": Later("uint8", (MB,), broken)})
    with pytest.raises(FrameError):
        Fetched(offered(bad, failed=found.append).reference, size_of(bad)).frames(size_of(bad))
    assert [str(error) for error in found] == ["a reply on this disk was changed"]


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[Callable[[int, Message], Message]]:
    """A sender that stops before its second piece."""
    goes_on = threading.Event()

    def lies(request: int, reply: Message) -> Message:
        if request >= 2:
            goes_on.wait(60)
        return reply

    yield lies
    goes_on.set()


def test_a_sender_that_stops_is_late_and_is_not_waited_for(silent: Lie) -> None:
    began = time.monotonic()
    with pytest.raises(Late):
        fetched(THREE, seconds=0.5, lies=silent)
    assert time.monotonic() - began < 20


def test_a_transfer_that_is_given_up_ends_at_once(silent: Lie) -> None:
    waits = Fetched(offered(THREE).reference, size_of(THREE), lies=silent, until=None)
    threading.Timer(0.3, waits.given_up.set).start()
    began = time.monotonic()
    with pytest.raises(FrameError, match="given up"):
        waits.frames(size_of(THREE))
    assert time.monotonic() - began < 20


def test_nvflare_keeps_no_message_that_was_read() -> None:
    offer = offered(THREE)
    Fetched(offer.reference, size_of(THREE)).frames(size_of(THREE))
    flare.wait_for(lambda: DownloadService.get_transaction_id(offer.reference) is None, 30.0)
