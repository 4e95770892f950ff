"""A worker's ends of the two pipes to its supervisor. No torch here: the pipes are taken over before it is imported.

stdin carries the frames to the worker, stdout its replies. Whatever else prints on stdout (a library's notice) goes to stderr
instead, which the supervisor keeps as the worker's last words.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from typing import BinaryIO

from anyrank import stopping
from anyrank.errors import FrameError
from anyrank.messages.frame import Frame, read, write
from anyrank.worker import memory

MOST_BYTES = 1 << 40  # of a frame from the worker's own supervisor
GONE = 3  # exit status: the supervisor has gone, or has sent what is no frame


class Channel:
    """Frames in and out. A thread of its own reads, so that the worker ends with its supervisor, whatever it is doing."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, most_bytes: int = MOST_BYTES) -> None:
        self._source, self._sink, self._most_bytes = source, sink, most_bytes
        self._came: queue.Queue[Frame] = queue.Queue(maxsize=1)
        self._sending = threading.Lock()

    def start(self) -> Channel:
        """Start to read."""
        threading.Thread(target=self._follow, daemon=True).start()
        return self

    def refuse(self, reply: Frame, wait_s: float) -> None:
        """Answer one frame with `reply` if one comes within `wait_s` seconds. For a channel that is not started: its end is no
        reason to end this process, which has its own."""
        answering = threading.Thread(target=self._refuse, args=(reply,), daemon=True)
        answering.start()
        answering.join(wait_s)

    def _refuse(self, reply: Frame) -> None:
        with contextlib.suppress(FrameError, OSError, MemoryError):
            read(self._source, self._most_bytes)
            write(self._sink, reply)
            self._sink.flush()

    def receive(self) -> Frame:
        return self._came.get()

    def send(self, frame: Frame) -> None:
        try:
            with self._sending:
                write(self._sink, frame)
                self._sink.flush()
        except OSError:  # the supervisor has gone
            stopping.end(GONE)

    def _follow(self) -> None:
        while True:
            try:
                frame = read(self._source, self._most_bytes)
            except (FrameError, OSError):  # also at the end of the stream
                stopping.end(GONE)
            except MemoryError:
                stopping.end(memory.STATUS, "memory ran out while a frame was read")
            self._came.put(frame)


def take_over(most_bytes: int = MOST_BYTES) -> Channel:
    """This process's stdin and stdout as a channel that is not started yet, for frames of at most `most_bytes`. stdin is empty
    from now on, and stdout is stderr.

    From now on the system kills the process when its supervisor ends (Linux). Once the channel is started, the thread that
    reads ends it everywhere, but in a call of C that holds the interpreter. SIGTERM ends it too, without what is unfinished.
    """
    stopping.ask_for_death()
    stopping.on_signals()
    source, sink = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=1 << 18)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the supervisor's process
    return Channel(source, sink, most_bytes)
