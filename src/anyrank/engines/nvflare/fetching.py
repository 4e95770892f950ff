"""The bytes of frames over NVFlare, asked for piece by piece. No torch at import.

A message has a reference in the place of its frames. Who gets it asks for the pieces, one after another; each is made when it
is asked for, and let go once the next one is. So neither side has a message in memory as a whole, and who receives slowly is
sent slowly. NVFlare's own way to send arrays takes all of them into memory as it decodes a message, as many as the sender has,
and a sender that is gone in the middle of that ends the whole job. What goes wrong here is the end of one message alone.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from nvflare.apis.fl_constant import ServerCommandNames
from nvflare.fuel.f3.cellnet.defs import CellChannel
from nvflare.fuel.f3.streaming.download_service import Consumer, Downloadable, ProduceRC, download_object
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

from anyrank.errors import FrameError
from anyrank.messages.frame import Frame, pieces
from anyrank.messages.limits import told
from anyrank.worker.supervisor import Late

PIECE = 1 << 21  # bytes of a piece that is sent
_PIECE_MOST = 1 << 24  # bytes of a piece that is taken
_HELD = 1  # pieces that wait for who reads; one more is being read, one waits for room, and one is under way
_REQUEST_S = 30.0  # for one piece; NVFlare asks three times
_IDLE_S = 600.0  # after which NVFlare forgets a message whose pieces nobody asks for
_CHECK_S = 0.2
_NUMBER = "piece"
_REFERENCE_MOST = 100  # characters


def leave_references(cell: Any) -> None:
    """From now on arrays in replies to tasks, of which ours have none, are not taken into memory as they are decoded."""
    cell.decode_pass_through_topics.add((CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE))


# --- sending ---------------------------------------------------------------------------------------------------------


def joined(frames: Iterable[Frame], least: int = PIECE) -> Iterator[bytes]:
    """The bytes of frames, in pieces of `least` bytes and not much more; the last one may be smaller."""
    held: list[memoryview] = []
    filled = 0
    for frame in frames:
        for piece in pieces(frame):
            held.append(piece)
            filled += len(piece)
            if filled >= least:
                yield b"".join(held)
                held, filled = [], 0
    if held:
        yield b"".join(held)


class Offer(Downloadable):
    """Frames that the process named `to` may ask for, and nobody else: piece by piece in their order, the last one also again.

    `failed` gets what goes wrong while a piece is made. `reference`: what the other side needs to ask for them.
    """

    def __init__(self, cell: Any, to: str, frames: Sequence[Frame], failed: Callable[[Exception], None]) -> None:
        super().__init__(None)
        self._to, self._pieces, self._failed = to, joined(frames), failed
        self._number, self._last = -1, b""
        self._lock = threading.Lock()
        self.reference = ObjectDownloader(cell=cell, timeout=_IDLE_S, num_receivers=1).add_object(self)

    def produce(self, state: Mapping[str, Any] | None, requester: str) -> tuple[str, bytes | None, dict[str, int]]:
        """NVFlare asks for the piece whose number is in `state`; without one, for the first."""
        number = state.get(_NUMBER) if state else 0
        with self._lock:
            if requester != self._to or number not in (self._number, self._number + 1):
                return ProduceRC.ERROR, None, {}
            if number > self._number:
                try:
                    self._last = next(self._pieces, b"")
                except Exception as error:
                    self._pieces = iter(())
                    self._failed(error)
                    return ProduceRC.ERROR, None, {}
                self._number = number
            if not self._last:
                return ProduceRC.EOF, None, {}
            return ProduceRC.OK, self._last, {_NUMBER: number + 1}

    def release(self) -> None:
        """Nobody may ask any more: let go of the frames."""
        with self._lock:
            self._to, self._pieces, self._last = "", iter(()), b""


# --- receiving -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def incoming(
    cell: Any, source: str, reference: Any, most: int, until: float | None, given_up: threading.Event
) -> Iterator[Incoming]:
    """The stream of what the process named `source` offers under `reference`; the other arguments as `Incoming` has them."""
    stream = Incoming(cell, source, reference, most, until, given_up)
    try:
        yield stream
    finally:
        stream.close()


class Incoming(Consumer):
    """The stream of what the process named `source` offers under a reference: `most` bytes at most, until `until`
    (`time.monotonic`, `None` without an end) or until `given_up`. A thread of its own asks for the pieces.

    `readinto` raises `Late`, and `FrameError` for anything else that goes wrong. `close` comes last.
    """

    supports_pipelining = True  # the next piece is asked for while this one is consumed
    value = None  # with `triggered`, NVFlare takes this for its signal to stop

    def __init__(
        self, cell: Any, source: str, reference: Any, most: int, until: float | None, given_up: threading.Event
    ) -> None:
        super().__init__()
        if not isinstance(reference, str) or not 0 < len(reference) <= _REFERENCE_MOST:
            raise FrameError(f"parcel, frames: expected a reference, got {told(reference)}")
        self._most, self._until, self._given_up = most, until, given_up
        self._pieces: queue.Queue[bytes] = queue.Queue(_HELD)
        self._now, self._ended, self._received, self._fault = memoryview(b""), False, 0, ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(cell, source, reference), name="fetch", daemon=True)
        self._thread.start()

    # --- for who reads ---

    def readinto(self, buffer: memoryview, /) -> int:
        if not len(self._now) and not self._ended:
            self._now = memoryview(self._next())
            self._ended = not len(self._now)
        count = min(len(buffer), len(self._now))
        buffer[:count], self._now = self._now[:count], self._now[count:]
        return count

    def close(self) -> None:
        """Nobody reads any more; the thread ends soon."""
        self._closed.set()
        self._now, self._ended = memoryview(b""), True
        with contextlib.suppress(queue.Empty):
            self._pieces.get_nowait()

    def _next(self) -> bytes:
        """The next piece, or nothing at the end."""
        while True:
            if self._is_late:
                raise Late("the frames did not arrive in time")
            if self._given_up.is_set():
                raise FrameError("parcel: expected its frames, got none: it was given up")
            with contextlib.suppress(queue.Empty):
                piece = self._pieces.get(timeout=_CHECK_S)
                break
        if not piece and self._fault:
            raise FrameError(f"parcel: {self._fault}")
        return piece

    @property
    def _is_late(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    # --- for NVFlare, in the thread that asks ---

    def _ask(self, cell: Any, source: str, reference: str) -> None:
        try:
            download_object(source, reference, _REQUEST_S, cell, self, optional=True, abort_signal=self)
        except Exception as error:  # of NVFlare, over what a sender made of its messages
            self._fault = self._fault or f"its frames did not arrive ({type(error).__name__})"
        self._put(b"")

    @property
    def triggered(self) -> bool:
        return self._closed.is_set() or self._given_up.is_set() or self._is_late

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        if type(data) is not bytes or not 0 < len(data) <= _PIECE_MOST:
            self._fault = f"expected pieces of at most {_PIECE_MOST} bytes, got something else"
        elif self._received + len(data) > self._most:
            self._fault = f"expected the {self._most} bytes that were declared, got more"
        if self._fault:
            raise FrameError(self._fault)
        self._received += len(data)
        self._put(data)
        return state

    def _put(self, piece: bytes) -> None:
        """Wait for room: NVFlare asks for no further piece meanwhile."""
        while not self.triggered:
            with contextlib.suppress(queue.Full):
                self._pieces.put(piece, timeout=_CHECK_S)
                break

    def download_completed(self, ref_id: str) -> None:
        """All pieces have come."""

    def download_failed(self, ref_id: str, reason: str) -> None:
        self._fault = self._fault or "its frames did not arrive"
