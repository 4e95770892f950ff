"""The server's side of one site: asked as a supervised worker on this machine would be. No torch and no NVFlare here.

A question goes to the site as one task, and its replies are announced together. Their frames are read one after another by who
asked, while they arrive; nothing is checked or decoded where an announcement is put into the queue.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from anyrank.errors import FrameError
from anyrank.messages.frame import Frame, Readable, read, size_of
from anyrank.remote import parcels
from anyrank.remote.parcels import ASK, OPEN, Code
from anyrank.worker.supervisor import ERROR, Died, Late

_LOAD_S = 60.0
Receive = Callable[[Readable, int], Frame]  # how a frame is taken from a stream, of at most so many bytes


@dataclass(eq=False)
class Asked:
    """One question while it is open. `came` gets what becomes of it; `frames` are let go then."""

    number: int
    site: str
    kind: str
    frames: Sequence[Frame]
    replies: int
    seconds: float | None
    most: int
    came: queue.SimpleQueue[Came | Exception] = field(default_factory=queue.SimpleQueue)
    given_up: threading.Event = field(default_factory=threading.Event)

    def give_up(self, why: Exception) -> None:
        """Nobody waits any more; who has asked gets `why`. Any thread may do so."""
        self.came.put(why)
        self.given_up.set()

    def known(self) -> parcels.Question:
        """What the site is told about the frames."""
        header = self.frames[0].header
        last = max(frame.header.round for frame in self.frames)
        limits = (self.replies, self.seconds, self.most)
        sizes = [size_of(frame) for frame in self.frames]
        return parcels.Question(self.number, self.site, self.kind, header.run, last, *limits, sizes)

    def message(self) -> dict[str, Any]:
        """What the site is sent, with all bytes of the frames."""
        return parcels.message(self.known(), parcels.cut(self.frames))


@dataclass(frozen=True, eq=False)
class Came:
    """What a site has sent in reply, not yet checked. `parts`: its frames, or what they are to be fetched with."""

    about: Any
    parts: Any


class Port(Protocol):
    """What carries questions to sites."""

    def send(self, asked: Asked) -> None:
        """Offer the question to its site, and put what comes into `asked.came`. Returns at once."""

    def cancel(self, asked: Asked) -> None:
        """Nobody waits any more: what comes is dropped, and the site's worker stops."""

    def fetch(self, asked: Asked, known: parcels.Reply, parts: Any, until: float | None) -> AbstractContextManager[Readable]:
        """The bytes of what came, as a stream. Raises `FrameError`; the stream raises `FrameError` and `Late`, and ends early
        if the question is given up."""


class RemoteWorker:
    """A site's worker, in the place of a `Supervised` one. One thread at a time may ask it.

    `opening`, `opened` and `limit` (bytes of all frames of a reply) as there. `receive`: how a frame is taken from what came.
    `opening_s`: seconds for the opening, with the load of the base model in it.
    """

    def __init__(
        self,
        port: Port,
        site: str,
        opening: Callable[[], Frame],
        opened: Callable[[Frame], None],
        limit: int,
        receive: Receive = read,
        opening_s: float | None = None,
    ) -> None:
        self.site = site
        self._port, self._opening, self._opened, self._limit = port, opening, opened, limit
        self._receive, self._opening_s = receive, opening_s
        self._is_open, self._killed, self._said = False, False, b""
        self._asked: Asked | None = None
        self._numbers = itertools.count()

    def start(self, timeout_s: float | None = None) -> None:
        """Open the site's worker, if it is not. Raises `Died`, `Late`, and what `opened` raises."""
        if not self._is_open:
            self._open(timeout_s if timeout_s is not None else self._opening_s)

    def _open(self, timeout_s: float | None, before: bytes = b"") -> None:
        """`before`: what the site's worker said of itself before it was started anew; a site that says the same is the same."""
        (reply,) = self._question(OPEN, [self._opening()], 1, timeout_s)
        said = parcels.plain(reply)
        if said != before:
            self._opened(reply)
        self._said, self._is_open = said, True

    def ask(self, frames: Iterable[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        """Send `frames` and yield as many `replies`; an `error` frame is the last one. `timeout_s`: seconds for each reply.

        Raises `Died` or `Late`. A site whose process was started anew is opened anew, and asked once more: the round waits for
        that as long as for its reply, and a minute at least.
        """
        frames = list(frames)
        self.start()
        try:
            yield from self._question(ASK, frames, replies, timeout_s)
            return
        except _Closed:
            pass
        self._open(self._opening_s if timeout_s is None else max(timeout_s, _LOAD_S), self._said)
        yield from self._question(ASK, frames, replies, timeout_s)

    def kill(self) -> None:
        """Give up what is asked now; any thread may do so. Who asks it gets `Died`, until `revive`."""
        self._killed = True
        if (asked := self._asked) is not None:
            asked.give_up(Died("it was given up"))

    def revive(self) -> None:
        self._killed = False

    def end(self) -> None:
        """The next question opens the site's worker anew."""
        self._is_open = False

    def close(self) -> None:
        """Nobody asks any more. The site's worker ends with the job."""
        self.kill()

    # --- one question ---

    def _question(self, kind: str, frames: Sequence[Frame], replies: int, timeout_s: float | None) -> Iterator[Frame]:
        until = None if timeout_s is None else time.monotonic() + timeout_s * replies
        self._asked = asked = Asked(next(self._numbers), self.site, kind, frames, replies, timeout_s, self._limit)
        try:
            if self._killed:
                raise Died("it was given up")
            self._port.send(asked)
            yield from self._replies(asked, until)
        except BaseException:
            self._port.cancel(asked)
            raise
        finally:
            self._asked, asked.frames = None, ()

    def _replies(self, asked: Asked, until: float | None) -> Iterator[Frame]:
        """The frames of a site's reply, each once it is checked. The next one is received when it is asked for."""
        came = self._arrived(asked, until)
        asked.frames = ()
        try:
            known = self._checked(asked, came)
            with self._port.fetch(asked, known, came.parts, until) as stream:
                for frame in parcels.frames(known, stream, lambda part: self._receive(part, self._limit)):
                    yield frame
                    if frame.header.kind == ERROR:
                        return
        except FrameError as error:
            raise _reason(asked) or Died(str(error)) from None

    def _arrived(self, asked: Asked, until: float | None) -> Came:
        """What a site has sent in reply."""
        try:
            came = asked.came.get(timeout=None if until is None else max(until - time.monotonic(), 0))
        except queue.Empty:
            self._is_open = False  # the site ends its worker when it hears that nobody waits
            raise Late("the site did not reply in time") from None
        if isinstance(came, Exception):
            raise came
        return came

    def _checked(self, asked: Asked, came: Came) -> parcels.Reply:
        known = parcels.about(parcels.Reply, came.about)
        if (known.number, known.site) != (asked.number, asked.site):
            raise FrameError(f"reply: expected one to question {asked.number}, got one to {known.number}")
        parcels.check_declared(known, self._limit)
        self._check_code(known)
        if len(known.sizes) > asked.replies:
            raise FrameError(f"reply: expected at most {asked.replies} frames, got {len(known.sizes)}")
        return known

    def _check_code(self, known: parcels.Reply) -> None:
        if known.code == Code.OK:
            return
        if known.code in (Code.CLOSED, Code.CHANGED, Code.DIED, Code.LATE):
            self._is_open = False  # its process loads anew, for which a question's time is not meant
        if known.code == Code.CLOSED:
            raise _Closed("the site's worker is not open")
        if known.code == Code.LATE:
            raise Late("the site's worker took too long")
        raise Died(f"the site reports {known.code}")


def _reason(asked: Asked) -> Exception | None:
    """Why a question was given up while its reply was fetched."""
    return asked.came.get() if asked.given_up.is_set() else None


class _Closed(Died):
    """The site's process was started anew, and has not opened its worker yet."""
