"""The site's side of a job: NVFlare's client process, with our worker beside it. No torch here.

The heavy work is done in the worker, a process of its own that the supervisor starts again: this process stays small, and its
end would end the site's part in the job. It passes frames through, once their header and size are right, and answers each
question with frames or with a code. No text about a failure leaves the site: it stands in the site's own log.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from anyrank.engines.nvflare import fetching
from anyrank.errors import AnyRankError, FrameError, in_a_line
from anyrank.messages.frame import Frame, relay, size_of
from anyrank.remote import kits, parcels
from anyrank.remote.answering import Unanswered, check_frames, check_site, coded, same
from anyrank.remote.parcels import OPEN, Code, Question, Reply
from anyrank.worker.supervisor import Supervised

TASK, STOP = "anyrank", "anyrank.stop"
COMMAND = (sys.executable, "-P", "-m", "anyrank.worker", "--site")
_CHECK_S = 0.2

log = logging.getLogger(__name__)


class AnyRankExecutor(Executor):
    """Has no arguments: what the worker may do is in the site's own file, `local/site.toml` in its kit."""

    command: Sequence[str] = COMMAND

    def __init__(self) -> None:
        super().__init__()
        self._site, self._path = "", Path()
        self._limits: kits.Limits | None = None
        self._worker: Supervised | None = None
        self._number, self._stops = -1, threading.Event()
        self._fetching = (-1, threading.Event())  # the number of the last question, and whether nobody waits for its reply
        self._offer: fetching.Offer | None = None  # the last reply
        self._cell: Any = None
        self._job = ""
        self._lock = threading.Lock()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            self._begin(fl_ctx)
        elif event_type in (EventType.ABORT_TASK, EventType.ABOUT_TO_END_RUN, EventType.END_RUN):
            self._end()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        number = -1
        try:
            asked = parcels.about(Question, shareable.pop(parcels.ABOUT, None))
            number = asked.number
            return self._answer(asked, shareable.pop(parcels.FRAMES, None), fl_ctx)
        except FrameError as error:
            log.error("refused: %s", in_a_line(error))
            return self._reply(number, Code.REFUSED)
        except BaseException as error:  # nothing may end this process, and no text leaves it
            log.exception("failed: %s", in_a_line(error))
            return self._reply(number, Code.FAILED)

    # --- the job ---

    def _begin(self, fl_ctx: FLContext) -> None:
        local = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_site_config_dir())
        self._site, self._path = fl_ctx.get_identity_name(), local / kits.SITE
        engine = fl_ctx.get_engine()
        engine.register_aux_message_handler(STOP, self._stop)
        threading.Thread(target=self._follow, args=(fl_ctx.get_run_abort_signal(),), daemon=True).start()
        try:
            self._limits = kits.limits(self._path)
        except AnyRankError as error:
            log.error("%s", in_a_line(error))

    def _follow(self, abort_signal: Signal) -> None:
        """End the worker with the job, whatever this process is doing."""
        while not self._stops.wait(_CHECK_S):
            if abort_signal is not None and abort_signal.triggered:
                self._end()

    def _end(self) -> None:
        with self._lock:
            self._stops.set()
            self._fetching[1].set()
            if self._worker is not None:
                self._worker.kill()

    def _stop(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """The server does not wait for a question any more."""
        with self._lock:
            if request.get("number") == self._fetching[0]:
                self._fetching[1].set()
            if self._worker is not None and request.get("number") == self._number:
                self._worker.kill()
        return Shareable()

    # --- one question ---

    def _answer(self, asked: Question, reference: Any, fl_ctx: FLContext) -> Shareable:
        if self._limits is None:
            return self._reply(asked.number, Code.FAILED)
        self._let_go()
        self._job, self._cell = fl_ctx.get_job_id(), fl_ctx.get_engine().get_cell()
        try:
            frames = self._frames(asked, reference)
            return self._sent(asked, self._open(asked, frames) if asked.kind == OPEN else self._ask(asked, frames))
        except Unanswered as error:
            log.error("question %d: %s: %s", asked.number, error.code, error.text)
            return self._reply(asked.number, error.code)
        finally:
            with self._lock:
                self._number = -1

    def _frames(self, asked: Question, reference: Any) -> list[Frame]:
        """The frames of a question, after all checks that need no worker."""
        check_site(asked, self._site)
        parcels.check_declared(asked, self._limits.download)
        frames = self._fetched(asked, reference)
        check_frames(asked, self._site, frames)
        return frames

    def _fetched(self, asked: Question, reference: Any) -> list[Frame]:
        """The frames of a question, until nobody waits for its reply any more."""
        with self._lock:
            self._fetching = (asked.number, threading.Event())
            if self._stops.is_set():
                self._fetching[1].set()
        most, until = sum(asked.sizes), None if asked.seconds is None else time.monotonic() + asked.seconds * asked.replies
        try:
            with fetching.incoming(self._cell, self._server, reference, most, until, self._fetching[1]) as stream:
                return list(parcels.frames(asked, stream, lambda part: relay(part, self._limits.download)))
        except FrameError:
            if self._fetching[1].is_set():
                raise Unanswered(Code.DIED, "nobody waits for it any more") from None
            raise

    @property
    def _server(self) -> str:
        """NVFlare's name of the server's process in this job."""
        return FQCN.join([FQCN.ROOT_SERVER, self._job])

    def _open(self, asked: Question, frames: Sequence[Frame]) -> list[Frame]:
        (opening,) = frames
        came: list[Frame] = []
        command = (*self.command, str(self._path))
        worker = Supervised(lambda: opening, same(came), self._limits.upload, command=command, receive=relay)
        if self._worker is not None:
            self._worker.close()
        self._turn(asked, worker)
        with coded():
            worker.start(asked.seconds)
        return came

    def _ask(self, asked: Question, frames: list[Frame]) -> list[Frame]:
        """A worker that has ended is opened by the server: loading the base model has more time than a question."""
        if self._worker is None:
            raise Unanswered(Code.CLOSED, "its worker has not been opened")
        if not self._worker.is_ready:
            raise Unanswered(Code.CLOSED, "its worker has ended, or has sent what nobody asked for; it is started anew")
        self._turn(asked, self._worker)
        with coded():
            return list(self._worker.ask(frames, asked.replies, asked.seconds))

    def _turn(self, asked: Question, worker: Supervised) -> None:
        """It is this worker's turn, with this question: what stops the question or the job from now on ends the worker."""
        with self._lock:
            if self._fetching[1].is_set():
                raise Unanswered(Code.DIED, "nobody waits for it any more")
            worker.revive()
            self._worker, self._number = worker, asked.number

    def _sent(self, asked: Question, frames: Sequence[Frame]) -> Shareable:
        sizes, most = [size_of(frame) for frame in frames], min(asked.most, self._limits.upload)
        if sum(sizes) > most:
            raise Unanswered(Code.TOO_LARGE, f"expected at most {most} bytes, got {sum(sizes)}")
        self._offer = fetching.Offer(self._cell, self._server, frames, lambda error: log.error("%s", in_a_line(error)))
        return self._reply(asked.number, Code.OK, sizes, self._offer.reference)

    def _let_go(self) -> None:
        """Nobody may ask for the last reply any more."""
        if self._offer is not None:
            self._offer.release()

    def _reply(self, number: int, code: Code, sizes: Sequence[int] = (), reference: str = "") -> Shareable:
        known = Reply(max(number, 0), self._site, code.value, tuple(sizes))
        return Shareable({parcels.ABOUT: parcels.table(known), parcels.FRAMES: reference})
