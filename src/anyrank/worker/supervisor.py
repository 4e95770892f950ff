"""The supervisor of a worker: starts it, asks it, limits its time and memory, starts it again. No torch here.

A worker that dies or takes too long costs the replies that it owes, and no more: the next question starts it again, after a
pause that grows while it keeps dying.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from anyrank import stopping
from anyrank.errors import FrameError, printable, shortened
from anyrank.messages.frame import Frame, Readable, read, write
from anyrank.worker import memory
from anyrank.worker.pipes import Pipe

COMMAND = (sys.executable, "-P", "-m", "anyrank.worker")  # -P: no module of the working folder takes the place of another
PROGRESS, ERROR = "progress", "error"  # kinds of frames: one that goes ahead of a reply, and one that is the last
_GRACE_S = 2.0  # from the end of a worker's pipes to the end of its process
_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # before a start, by the number of deaths since the last reply
_KILLED = -9
# Last words, in Python and in C++, of a process that was refused memory.
_SHORT = ("MemoryError", "std::bad_alloc", "can't start new thread")


class Died(Exception):
    """The worker ended before it had replied; the text says how, in words that may name its data: not for other machines.

    `out_of_memory`: it took more than it may, or the system ended it because memory was short.
    """

    def __init__(self, text: str, out_of_memory: bool = False) -> None:
        super().__init__(text)
        self.out_of_memory = out_of_memory


class Late(Exception):
    """The worker did not reply in time, and was ended."""


class Supervised:
    """One worker process. One thread at a time may use it; any thread may `kill` it.

    `opening` gives the frame that a new process gets first; its reply goes to `opened`, which may raise what it likes. `env`:
    changes to the environment. `receive` reads the replies to questions, as `frame.read` does. `load_s`: seconds from the start
    to the first reply (`None`: no limit). `most_memory`: bytes that the process may take (0: no limit); `refuse`: the system
    refuses it more, so that a client's training fails rather than the process; in any case it is ended when it has more. Only
    Linux does either.
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
        load_s: float | None = None,
        most_memory: int = 0,
        refuse: bool = True,
    ) -> None:
        self._opening, self._opened, self._limit = opening, opened, limit
        self._env, self._command, self._on_progress = dict(env or {}), tuple(command), on_progress
        self._load_s, self._most_memory, self._refuse = load_s, most_memory, refuse
        self._process: subprocess.Popen[bytes] | None = None
        self._life = contextlib.ExitStack()
        self._receive = receive
        self._words, self._deaths, self._kills_before, self._too_large = _Words(), 0, 0, False
        self._stopped, self._changing = threading.Event(), threading.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's process, while it lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def is_ready(self) -> bool:
        """Whether the worker runs, and has sent nothing that nobody asked for: the next question does not start it anew."""
        return self.pid is not None and self._stdout.is_silent()

    def start(self, timeout_s: float | None = None) -> None:
        """Start the worker if it does not run, and open it. Raises `Died`, `Late`, and what `opened` raises.

        One that has ended since its last reply, or has sent what nobody asked for, is started anew: it owes nothing.
        """
        if self._process is not None:
            if self.is_ready:
                return
            self.end()
        self._stopped.wait(_PAUSES_S[min(self._deaths, len(_PAUSES_S) - 1)])
        self._begin()
        with self._owing(timeout_s if timeout_s is not None else self._load_s):
            self._put(self._opening())
            reply = self._take()
        try:
            self._opened(reply)
        except BaseException:
            self.end()
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
        """End the worker: it ends by itself when its pipe does; after some seconds it is killed."""
        self._stopped.set()
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
            self.end()

    def end(self) -> None:
        """End the worker at once, with what it has started."""
        process, self._process = self._process, None
        if process is not None:
            stopping.kill_group(process)
            process.wait()
            self._life.close()

    def kill(self) -> None:
        """End the worker at once, from any thread. Until `revive`, who asks it gets `Died`, also who is about to start it."""
        self._stopped.set()
        with self._changing:
            process = self._process
        if process is not None:
            stopping.kill_group(process)

    def revive(self) -> None:
        """After `kill` or `close`: the worker may be started again."""
        self._stopped.clear()

    # --- the process ---

    def _begin(self) -> None:
        env = {**os.environ, "PYTHONPATH": _modules(), **self._env}
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._kills_before, self._too_large, self._words = memory.kills(), False, _Words()
        with self._changing:  # after this, `kill` finds the process; before it, the process finds that it was killed
            if self._stopped.is_set():
                raise Died("it was stopped")
            try:
                # In a session of its own: the terminal's Ctrl-C does not reach it while it still imports.
                ways = {"env": env, "start_new_session": os.name == "posix", "bufsize": 0, **pipes}
                process = _STARTER.run(lambda: subprocess.Popen(self._command, **ways))
            except OSError as error:
                self._deaths += 1
                raise Died(f"no process can be started ({error.strerror or error})") from None
            self._process = process
        if self._most_memory and self._refuse:
            memory.limit(process.pid, self._most_memory)
        lives = lambda: process.poll() is None  # noqa: E731
        self._stdin, self._stdout = Pipe(process.stdin, self._look), Pipe(process.stdout, self._look)
        for pipe in (process.stdin, process.stdout):
            self._life.callback(_closed, pipe)
        listener = threading.Thread(target=self._words.follow, args=(process.stderr, lives), name="stderr", daemon=True)
        listener.start()
        self._life.callback(self._words.finish, listener)
        self._life.enter_context(stopping.child(process))

    def _look(self) -> bool:
        """Whether the worker lives. One that has taken too much memory is ended."""
        process = self._process
        if self._most_memory and memory.taken(process.pid) > self._most_memory:
            self._too_large = True
            stopping.kill_group(process)
        return process.poll() is None

    def _put(self, frame: Frame) -> None:
        write(self._stdin, frame)

    def _take(self, receive: Callable[[Readable, int], Frame] = read) -> Frame:
        while True:
            frame = receive(self._stdout, self._limit)
            if frame.header.kind != PROGRESS:
                return frame
            self._on_progress(frame)

    @contextlib.contextmanager
    def _owing(self, timeout_s: float | None) -> Iterator[None]:
        """While the worker owes something: `Died` or `Late` where it does not come, with the worker ended."""
        process = self._process
        limit = _Limit(timeout_s, lambda: stopping.kill_group(process))
        try:
            with limit:
                yield
        except (FrameError, OSError) as error:
            raise self._lost(process, error, limit.over) from None
        if limit.over:  # at the very moment when the reply came
            raise self._lost(process, None, True)

    def _lost(self, process: subprocess.Popen[bytes], error: Exception | None, late: bool) -> Died | Late:
        """What became of the worker, which is ended if it has not ended."""
        ended = self._stdin.ended or self._stdout.ended
        if ended:  # by itself, so that it has a status of its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        code = process.poll()
        self.end()
        self._deaths += 1
        if late:
            return Late("it took too long")
        if self._too_large:
            return Died(f"it took more than its {_gigabytes(self._most_memory)} of memory", out_of_memory=True)
        words = self._words.last()
        short = code == _KILLED and memory.kills() > self._kills_before
        if code == memory.STATUS or short or (code and any(sign in words for sign in _SHORT)):
            return Died(f"memory ran out{words}", out_of_memory=True)
        if self._stopped.is_set():
            return Died("it was stopped")
        return Died(f"{_how(code) or error}{words}")


class _Starter:
    """A thread that starts all processes, and ends with this process. On Linux a worker that has asked to die with its parent
    dies with the thread that started it, and the thread that asks for a start may end long before.
    """

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._lock, self._thread = threading.Lock(), None

    def run(self, make: Callable[[], Any]) -> Any:
        """`make()`, in that thread."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # also in a process that was forked from one with it
                self._thread = threading.Thread(target=self._follow, name="starter", daemon=True)
                self._thread.start()
        came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wanted.put((make, came))
        made, error = came.get()
        if error is not None:
            raise error
        return made

    def _follow(self) -> None:
        while True:
            make, came = self._wanted.get()
            try:
                came.put((make(), None))
            except BaseException as error:
                came.put((None, error))


_STARTER = _Starter()


class _Limit:
    """Within it, `end` is called when `seconds` are over (`None`: never); `over` says so afterwards, and stays as it is."""

    def __init__(self, seconds: float | None, end: Callable[[], None]) -> None:
        self.over, self._past, self._end, self._lock = False, False, end, threading.Lock()
        self._timer = threading.Timer(seconds, self._reached) if seconds is not None else None

    def __enter__(self) -> None:
        if self._timer:
            self._timer.daemon = True
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._past = True
        if self._timer:
            self._timer.cancel()

    def _reached(self) -> None:
        with self._lock:
            if not self._past:
                self.over = True
                self._end()


class _Words:
    """The end of what a process writes on stderr."""

    _KEPT = 1 << 13  # bytes

    def __init__(self) -> None:
        self._tail, self._over = b"", False

    def follow(self, stream: object, alive: Callable[[], bool]) -> None:
        """Read a stream to its end, and close it."""
        piece = bytearray(1 << 16)
        with contextlib.suppress(OSError, ValueError), stream:
            pipe = Pipe(stream, alive)
            while not self._over and (count := pipe.readinto(memoryview(piece))):
                self._tail = (self._tail + piece[:count])[-self._KEPT :]

    def finish(self, follower: threading.Thread) -> None:
        """The process has ended: `follower` reads what is left, and stops also if there is no end of it."""
        follower.join(_GRACE_S)
        self._over = True

    def last(self) -> str:
        """The last line that says something, as a clause; empty if there is none."""
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines()]
        found = next((line for line in reversed(lines) if line), "")
        return f"; its last words: {shortened(printable(found), 200)}" if found else ""


def _how(code: int | None) -> str:
    if code is None:
        return ""
    if code < 0:
        return f"its process was ended by signal {-code}, from outside or because memory was short"
    return f"its process ended with status {code}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:g} GB"


def _modules() -> str:
    """Where this process finds modules, for a process that is to find the same ones."""
    return os.pathsep.join(os.path.abspath(path) for path in sys.path if os.pathsep not in path)


def _closed(pipe: object) -> None:
    with contextlib.suppress(OSError):
        pipe.close()
