"""A time limit on other people's code: an exception that is raised in it when its time is over.

In the main thread of a POSIX system, a signal interrupts Python code and calls that wait, such as `time.sleep`. In other
threads, and on Windows, the exception is set from a second thread and is raised at the next Python instruction. A single call
into C that does not return and does not look at signals cannot be interrupted within a process.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_AGAIN_S = 0.5  # code that catches the exception and goes on gets it again after so long


class Overdue(BaseException):
    """The time is over. Not an `Exception`, so that code which handles its own errors does not handle this one."""


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `Overdue` in the block when it has run for so long (`None`: never)."""
    if seconds is None:
        yield
    elif hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        with _by_signal(seconds):
            yield
    else:
        with _by_thread(seconds):
            yield


def each(replies: Iterator[T], seconds: float | None) -> Iterator[T]:
    """The items of `replies`; raises `Overdue` when an item takes longer. The time of the consumer does not count."""
    while True:
        with limited(seconds):
            try:
                reply = next(replies)
            except StopIteration:
                return
        yield reply


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    armed = True

    def over(*_: object) -> None:
        if armed:  # else the signal was on its way when the block ended
            raise Overdue

    before = signal.signal(signal.SIGALRM, over)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
        yield
    finally:
        while signal.getsignal(signal.SIGALRM) is over:
            try:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            except Overdue:  # the signal came just before `armed` was set
                continue


@contextmanager
def _by_thread(seconds: float) -> Iterator[None]:
    thread, done = ctypes.c_ulong(threading.get_ident()), threading.Event()

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Overdue))
            wait = _AGAIN_S

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    try:
        watcher.start()
        yield
    finally:
        ended = False
        while not ended:  # the exception may come in here, too
            try:
                done.set()
                watcher.join()
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # one that was set and is not raised yet
                ended = True
            except Overdue:
                continue
