"""The supervisor of a worker: starts it, asks it, bounds its time, starts it again. No torch here.

A worker that dies or takes too long costs the replies that it owes, and no more: the next question starts it again, after a
pause that grows while it keeps dying.
"""

from __future__ import annotations

import collections
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from anyrank import stopping
from anyrank.errors import FrameError, printable, shortened
from anyrank.messages.frame import Frame, Readable, read, write

COMMAND = (sys.executable, "-m", "anyrank.worker")
PROGRESS, ERROR = "progress", "error"  # kinds of frames: one that goes ahead of a reply, and one that is the last
_WORDS = 20  # lines of stderr that are kept
_GRACE_S = 2.0  # from the end of a worker's pipes to the end of its process
_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # before a start, by the number of deaths since the last reply


class Died(Exception):
    """The worker ended before it had replied; the text says how, in words that may name its data: not for other machines."""


class Late(Exception):
    """The worker did not reply in time, and was ended."""


class Supervised:
    """One worker process. One thread at a time may ask it.

    `opening` gives the frame that a new process gets first; its reply goes to `opened`, which may raise what it likes. `env`:
    changes to the environment. `receive` reads the replies to questions, as `frame.read` does.
    """

    def __init__(
        self,
        opening: Callable[[], Frame],
        opened: Callable[[Frame], None],
        limit: int,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
        on_progress: Callable[[Frame], None] = lambda frame: None,
        receive: Callable[[Readable, int], Frame] = read,
    ) -> None:
        self._opening, self._opened, self._limit = opening, opened, limit
        self._env, self._command, self._on_progress = dict(env or {}), tuple(command), on_progress
        self._process: subprocess.Popen[bytes] | None = None
        self._life = contextlib.ExitStack()
        self._words: collections.deque[str] = collections.deque(maxlen=_WORDS)
        self._deaths, self._closed, self._receive = 0, False, receive

    @property
    def pid(self) -> int | None:
        """The worker's process, while it lives."""
        return self._process.pid if self._process else None

    def start(self, timeout_s: float | None = None) -> None:
        """Start the worker if it does not run, and open it. Raises `Died`, `Late`, and what `opened` raises."""
        if self._process is not None:
            return
        time.sleep(_PAUSES_S[min(self._deaths, len(_PAUSES_S) - 1)])
        if self._closed:
            raise Died("it was closed")
        self._begin()
        with self._owing(timeout_s):
            self._put(self._opening())
            reply = self._take()
        try:
            self._opened(reply)
        except BaseException:
            self.kill()
            self._reap()
            raise

    def ask(self, frames: Iterable[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        """Send `frames` and yield as many `replies`; an `error` frame is the last one. `timeout_s`: seconds for each reply.

        Raises `Died` or `Late`; the worker has then ended, and the next question starts it again.
        """
        self.start()
        with self._owing(timeout_s):
            for frame in frames:
                self._put(frame)
        for _ in range(replies):
            with self._owing(timeout_s):
                reply = self._take(self._receive)
            self._deaths = 0
            yield reply
            if reply.header.kind == ERROR:
                return

    def close(self) -> None:
        """End the worker, which nobody asks any more: it ends by itself when its pipe does; after some seconds it is killed."""
        self._closed = True
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
            self.kill()
            self._reap()

    def kill(self) -> None:
        """End the worker at once; any thread may do so. Who asks it gets `Died`."""
        process = self._process
        if process is not None:
            process.kill()

    # --- the process ---

    def _begin(self) -> None:
        env = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"), **self._env}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            # In a session of its own: the terminal's Ctrl-C does not reach it while it still imports.
            process = subprocess.Popen(self._command, env=env, start_new_session=os.name == "posix", bufsize=0, **pipes)
        except OSError as error:
            self._deaths += 1
            raise Died(f"no process can be started ({error.strerror or error})") from None
        self._words.clear()
        self._life.enter_context(stopping.child(process))
        for pipe in (process.stdin, process.stdout):
            self._life.callback(_closed, pipe)
        threading.Thread(target=_listen, args=(process.stderr, self._words), daemon=True).start()
        self._process = process

    def _put(self, frame: Frame) -> None:
        write(self._process.stdin, frame)

    def _take(self, receive: Callable[[Readable, int], Frame] = read) -> Frame:
        while True:
            frame = receive(self._process.stdout, self._limit)
            if frame.header.kind != PROGRESS:
                return frame
            self._on_progress(frame)

    @contextlib.contextmanager
    def _owing(self, timeout_s: float | None) -> Iterator[None]:
        """While the worker owes something: `Died` or `Late` where it does not come, with the worker ended."""
        process, late = self._process, threading.Event()
        timer = threading.Timer(timeout_s, lambda: (late.set(), process.kill())) if timeout_s is not None else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            yield
        except (FrameError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            code = process.poll()
            self.kill()
            self._reap()
            self._deaths += 1
            raise Late("it took too long") if late.is_set() else Died(self._why(code, error)) from None
        finally:
            if timer:
                timer.cancel()

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait()
            self._life.close()

    def _why(self, code: int | None, error: Exception) -> str:
        last = next((line.strip() for line in reversed(self._words) if line.strip()), "")
        return f"{_how(code) or str(error)}{f'; its last words: {shortened(printable(last), 200)}' if last else ''}"


def _how(code: int | None) -> str:
    if code is None:
        return ""
    if code < 0:
        return f"its process was ended by signal {-code}, from outside or because memory was short"
    return f"its process ended with status {code}"


def _listen(stream: object, words: collections.deque[str]) -> None:
    """Keep the last lines of a stream, and close it at its end."""
    with contextlib.suppress(OSError, ValueError), stream:
        for line in stream:
            words.append(line[:2000].decode(errors="replace"))


def _closed(pipe: object) -> None:
    with contextlib.suppress(OSError):
        pipe.close()
