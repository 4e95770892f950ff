"""What stands beside a site's SuperNode: it keeps the site's worker, and answers what ClientApps bring. No torch, no flwr.

Flower starts a process for each message, so that nothing may live in it. The worker, with the base model loaded, lives here:
its crash costs one reply. What is asked is checked before the worker gets it; each question is answered with frames or with a
code, and no text about a failure leaves the site: it stands in the site's own log.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyrank.engines.flower import relay
from anyrank.errors import FrameError, in_a_line
from anyrank.messages.frame import Frame, read
from anyrank.remote import parcels
from anyrank.remote.answering import Unanswered, check_frames, check_site, coded, same
from anyrank.remote.kits import Limits
from anyrank.remote.parcels import ABOUT, FRAMES, OPEN, Code, Question, Reply
from anyrank.worker.supervisor import Supervised

_GLANCE_S = 0.1  # between two looks whether somebody still waits for the reply
_TURN_S = 30.0  # that a question waits for the end of the one before it

log = logging.getLogger(__name__)

Make = Callable[[Callable[[], Frame], Callable[[Frame], None]], Supervised]


def command(path: Path, python: str = "") -> tuple[tuple[str, ...], dict[str, str]]:
    """The command of the worker of the site file at `path`, and what its environment has besides.

    `python`: the interpreter of the worker; empty: this one. Another one finds its own packages, and none of this one's.
    """
    words = (python or sys.executable, "-P", "-m", "anyrank.worker", "--site", str(path))
    return words, ({"PYTHONPATH": ""} if python and python != sys.executable else {})


class Attendant:
    """Answers questions to one site. `site`: its name; `make`: makes its worker, from the functions that `Supervised` takes."""

    def __init__(self, site: str, limits: Limits, make: Make) -> None:
        self.site, self._limits, self._make = site, limits, make
        self._worker: Supervised | None = None
        self._run = ""
        self._turn, self._closed = threading.Lock(), threading.Event()

    # --- the socket ---

    def serve(self, listener: socket.socket) -> None:
        """Answer all who connect, until `close`."""
        while not self._closed.is_set():
            try:
                link, _ = listener.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self._one, args=(link,), name="question", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        if (worker := self._worker) is not None:
            worker.kill()

    def _one(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError):
            link.settimeout(relay.PIECE_S)
            if not link.recv(1, socket.MSG_PEEK):  # somebody has looked whether this one is there
                return None
            try:
                question = relay.read(link, lambda table: relay.check_sizes(table, self._limits.download))
            except FrameError as error:
                log.error("refused: %s", in_a_line(error))
                relay.write(link, self._reply(-1, Code.REFUSED))
                return relay.drop(link)
            relay.write(link, self.answer(question, _Watched(link, self._give_up)))
        return None

    def _give_up(self) -> None:
        """Nobody waits for the reply any more: what the worker does for it ends."""
        if (worker := self._worker) is not None:
            worker.kill()

    # --- one question ---

    def answer(self, question: relay.Message, watched: Any = None) -> relay.Message:
        """The reply to a question, whatever it is; nothing is raised. `watched` is entered while the worker is at it."""
        number = -1
        try:
            asked = parcels.about(Question, question.get(ABOUT))
            number = asked.number
            frames = self._frames(asked, question.get(FRAMES))
            return self._in_turn(asked, frames, watched)
        except FrameError as error:
            log.error("refused: %s", in_a_line(error))
            return self._reply(number, Code.REFUSED)
        except Unanswered as error:
            log.error("question %d: %s: %s", number, error.code, error.text)
            return self._reply(number, error.code)
        except Exception as error:
            log.exception("failed: %s", in_a_line(error))
            return self._reply(number, Code.FAILED)

    def _frames(self, asked: Question, parts: Any) -> list[Frame]:
        """The frames of a question, after all checks that need no worker."""
        check_site(asked, self.site)
        parcels.check_declared(asked, self._limits.download)
        parcels.check_parts(asked, parts)
        frames = [read(parcels.Stream(part), self._limits.download, last=True) for part in parts]
        check_frames(asked, self.site, frames)
        return frames

    def _in_turn(self, asked: Question, frames: list[Frame], watched: Any) -> relay.Message:
        if not self._turn.acquire(timeout=_TURN_S):
            raise Unanswered(Code.FAILED, "another question is being answered; one server at a time may ask a site")
        try:
            if self._closed.is_set():
                raise Unanswered(Code.DIED, "the site stops")
            with watched or contextlib.nullcontext():
                return self._sent(asked, self._open(asked, frames) if asked.kind == OPEN else self._ask(asked, frames))
        finally:
            self._turn.release()

    def _open(self, asked: Question, frames: Sequence[Frame]) -> list[Frame]:
        (opening,) = frames
        came: list[Frame] = []
        if self._worker is not None:
            self._worker.close()
        self._run, self._worker = asked.run, self._make(lambda: opening, same(came))
        with coded():
            self._worker.start(asked.seconds)
        return came

    def _ask(self, asked: Question, frames: list[Frame]) -> list[Frame]:
        if self._worker is None or self._run != asked.run:
            raise Unanswered(Code.CLOSED, "its worker has not been opened for this run")
        self._worker.revive()
        with coded():
            return list(self._worker.ask(frames, asked.replies, asked.seconds))

    def _sent(self, asked: Question, frames: Sequence[Frame]) -> relay.Message:
        parts = parcels.cut(frames)
        sizes, most = parcels.sizes(parts), min(asked.most, self._limits.upload)
        if sum(sizes) > most:
            raise Unanswered(Code.TOO_LARGE, f"expected at most {most} bytes, got {sum(sizes)}")
        return self._reply(asked.number, Code.OK, sizes, parts)

    def _reply(self, number: int, code: Code, sizes: Sequence[int] = (), parts: Sequence[Any] = ()) -> relay.Message:
        return parcels.message(Reply(max(number, 0), self.site, code.value, tuple(sizes)), parts)


class _Watched:
    """Within it `gone` is called if the other side of a connection goes away."""

    def __init__(self, link: socket.socket, gone: Callable[[], None]) -> None:
        self._link, self._gone, self._over = link, gone, threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        poller = select.poll()
        poller.register(self._link, select.POLLIN)
        while not self._over.is_set():
            if poller.poll(_GLANCE_S * 1000) and not self._over.is_set():  # nothing may come now but the end
                return self._gone()
        return None


def maker(limits: Limits, words: Sequence[str], env: Mapping[str, str]) -> Make:
    """Makes workers that run the command `words`."""
    return lambda opening, opened: Supervised(opening, opened, limits.upload, env=env, command=words)
