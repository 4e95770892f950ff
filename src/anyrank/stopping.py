"""How a process ends before its work is done: by a signal, or with the process that started it.

A signal ends the process where it stands, and not by an exception: one that is raised in the middle of an import, of a
destructor or of another library's `except` is lost there, or turns into another. A run can be killed at any moment, so nothing
has to be unwound. What must not remain is registered here: unfinished files, and child processes.

For commands and their workers. A program that uses the library keeps its own handlers, and its `KeyboardInterrupt`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KILL, _DEATH_SIGNAL = 9, 1  # SIGKILL and PR_SET_PDEATHSIG, by their numbers: not every system has the names
_PATIENCE = 1.0  # seconds that a signal waits for the interpreter, which may be in one long call of C
_GRACE = 2.0  # seconds that children have for ending by themselves

_unfinished: set[Path] = set()
_ending: list[int] = []  # the thread that ends this process
_one = threading.RLock()  # a second signal may interrupt the first one here
_holds: list[None] = []  # one entry while signals wait
_waiting: list[int] = []  # the signals that came meanwhile
_wakers: list[socket.socket] = []  # held open
_children: set[subprocess.Popen[bytes]] = set()
_words: list[Callable[[int], str]] = []  # the line that the last `on_signals` has asked for


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Within it `path`, a file or a folder, is removed when a signal ends the process."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _unfinished.discard(path)


def on_signals(words: Callable[[int], str] | None = None) -> None:
    """From now on SIGINT and SIGTERM end this process, with exit status 128 + its number and one line of `words(number)`.

    Only the main thread can ask for it; asked from another one, all stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _words[:] = [words] if words else []
    if not _wakers:
        _wakers.extend(socket.socketpair())
        _wakers[0].setblocking(False)
        threading.Thread(target=_watch, daemon=True).start()
    signal.set_wakeup_fd(_wakers[0].fileno(), warn_on_full_buffer=False)
    for each in _SIGNALS:
        signal.signal(each, _stop)


def handled() -> bool:
    """Whether signals end this process here. If they do, no signal raises a `KeyboardInterrupt`."""
    return signal.getsignal(signal.SIGINT) is _stop


def no_more() -> None:
    """The work is done and its exit status stands: what comes now is too late."""
    if threading.current_thread() is threading.main_thread():
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)


def end(status: int, line: str = "") -> NoReturn:
    """End this process at once, with its children and without what is unfinished; `line` goes to stderr."""
    with _one:
        first = not _ending
        _ending.append(threading.get_ident())
    if first:
        with contextlib.suppress(Exception):
            _end_children()
        for path in list(_unfinished):
            _remove(path)
        _say(line)
        os._exit(status)
    while True:  # another thread is at it
        time.sleep(1)


def _stop(number: int, frame: FrameType | None) -> None:
    if _holds:
        _waiting.append(number)
    elif threading.get_ident() not in _ending:  # a second signal does not break off what the first one began
        end(128 + number, _line(number))


def _line(number: int) -> str:
    return _words[0](number) if _words else ""


def _watch() -> None:
    """End the process where its main thread has not done so in time: it may be in one long call of C.

    The interpreter writes a signal's number to the socket when it arrives, whatever the main thread does.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # for the main thread, whose waiting they are to break off
    number = 0
    while number not in _SIGNALS:
        number = _wakers[1].recv(1)[0]
    time.sleep(_PATIENCE)
    if signal.getsignal(number) is not _stop:  # it came too late
        return
    if not _ending:
        end(128 + number, _line(number))
    time.sleep(_GRACE + _PATIENCE)
    os._exit(128 + number)


@contextlib.contextmanager
def child(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within it the child process, which leads a session of its own, ends when a signal ends this one."""
    _children.add(process)
    try:
        yield
    finally:
        _children.discard(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a child that was started in a session of its own, with the processes that it has started there."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # they are all gone
            os.killpg(process.pid, _KILL)
    with contextlib.suppress(OSError):
        process.kill()


def _end_children() -> None:
    """Ask the children to end, which then leave nothing unfinished, and kill those that take too long."""
    last, children = time.monotonic() + _GRACE, list(_children)
    for process in children:
        with contextlib.suppress(OSError):
            process.terminate()
    for process in children:
        while process.poll() is None and time.monotonic() < last:
            time.sleep(0.01)
        kill_group(process)
    if "multiprocessing.process" not in sys.modules:
        return
    from multiprocessing import active_children

    stop_all(active_children())


def stop_all(children: Any) -> None:
    """End these processes: first by asking, after some seconds by killing."""
    for child in children:
        child.terminate()
    last = time.monotonic() + _GRACE
    for child in children:
        child.join(max(0.0, last - time.monotonic()))
        if child.is_alive():
            child.kill()
    for child in children:
        child.join(_PATIENCE)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _say(line: str) -> None:
    """Straight to the system: the interrupted code may hold the lock of `sys.stderr`."""
    if line:
        with contextlib.suppress(OSError):
            shown = "\x1b[?25h\n" if os.isatty(2) else ""  # a live display has hidden the cursor, and stands in its line
            os.write(2, f"{shown}{line}\n".encode(errors="replace"))


# --- parents and children ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def starting_a_child() -> Iterator[None]:
    """Around the start of a child process.

    The child does not hear the terminal's Ctrl-C, at which it would print a traceback while it still imports: its parent ends
    it. And a signal to the parent waits until the child is known, so that it is ended too.
    """
    mask = getattr(signal, "pthread_sigmask", None)
    if mask:
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # as long as it is not, the start of a child begins with it, and takes the mask away
        before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    _holds.append(None)
    try:
        yield
    finally:
        _holds.pop()
        if mask:
            mask(signal.SIG_SETMASK, before)
        if _waiting and not _holds:
            _stop(_waiting[0], None)


def end_with(parent: Any) -> None:
    """From now on this process ends when `parent`, of `multiprocessing`, is gone, whatever it is doing.

    On Linux the system kills it. Everywhere a thread waits for the parent's handle, or for a pipe that the parent holds open;
    this also works if the parent ended before the system was asked. Each of the two suffices.
    """
    ask_for_death()
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def ask_for_death() -> None:
    """On Linux: the system is to kill this process when the thread that started it has ended, also with its whole process."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DEATH_SIGNAL, _KILL)


def _follow(parent: Any) -> None:
    parent.join()
    end(1)
