"""A site's worker as its server sees it: started in the background, with refusals kept apart from deaths."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from anyrank.errors import AnyRankError
from anyrank.messages import calls
from anyrank.messages.frame import Frame, Readable, read
from anyrank.worker.supervisor import Died, Supervised

_GRACE_S = 60.0  # that a round waits for a worker that is started anew, once after each time that it ended
_SHORT_S = 0.5  # that it waits afterwards
_SETUP_S = 3600.0  # that a worker may take to load its base model and examples


class Worker(Protocol):
    """Who carries frames to a site and back, as `anyrank.worker.supervisor.Supervised` does."""

    def start(self, timeout_s: float | None = None) -> None: ...

    def ask(self, frames: Iterable[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]: ...

    def kill(self) -> None: ...

    def revive(self) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


# Makes a site's worker, from what gives the first frame of a new process, what takes the reply to it, and what reads its other
# replies, as `frame.read` does.
Receive = Callable[[Readable, int], Frame]
Make = Callable[[Callable[[], Frame], Callable[[Frame], None], Receive], Worker]


class Seat:
    """One site's worker, as a `Post` asks it. `refusal`: the error by which the site, or the server's check of it, refused."""

    def __init__(
        self, make: Make, opening: Callable[[], Frame], opened: Callable[[Frame], None], receive: Receive = read
    ) -> None:
        self._worker = make(opening, opened, receive)
        self._arrival: _Arrival | None = None
        self._absent = False  # whether a round has waited for it already
        self.refusal: AnyRankError | None = None
        self.gate: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()  # held while a site that is there replies

    pid = 0  # a seat can always be asked: whether its site is there shows then

    def start(self) -> None:
        """Nothing: a site that is not there must not keep a round from beginning."""

    def ask(self, frames: Iterable[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        """The worker's replies. Raises `Died` or `Late` where it owes some: also if it refuses, or is not there yet."""
        self.refusal = None
        try:
            self._arrive()
            with self.gate:
                for reply in self._worker.ask(frames, replies, timeout_s):
                    if reply.header.kind == calls.ERROR:
                        raise calls.error_of(reply)
                    yield reply
        except AnyRankError as error:
            self.refusal = error
            raise Died("it refused") from None

    def _arrive(self) -> None:
        """Have the worker started, without waiting for long: it goes on starting while rounds pass without it."""
        self._arrival = self._arrival or _Arrival(self._worker)
        self._arrival.join(_SHORT_S if self._absent else _GRACE_S)
        self._absent = True
        if self._arrival.is_alive():
            raise Died("it is not there yet")
        arrival, self._arrival = self._arrival, None
        if arrival.error is not None:
            raise arrival.error
        self._absent = False

    def kill(self) -> None:
        self._worker.kill()

    def revive(self) -> None:
        self._worker.revive()

    def end(self) -> None:
        self._worker.end()

    def close(self) -> None:
        self._worker.close()


class _Arrival(threading.Thread):
    """The start of a worker; returns at once if it runs. `error`: why it is not there."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(daemon=True)
        self._worker, self.error = worker, None
        self.start()

    def run(self) -> None:
        try:
            self._worker.start(_SETUP_S)
        except BaseException as error:
            self.error = error


def process(command: Sequence[str], limit: int) -> Make:
    """A site's worker as a process on this machine; `limit`: bytes of a frame from it."""
    return lambda opening, opened, receive: Supervised(opening, opened, limit, command=tuple(command), receive=receive)
