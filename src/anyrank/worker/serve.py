"""The loop of a worker: a frame, its replies, the next frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from anyrank import stopping
from anyrank.errors import AnyRankError, FrameError
from anyrank.messages import calls
from anyrank.messages.frame import Frame
from anyrank.progress import Progress
from anyrank.worker import memory
from anyrank.worker.channel import GONE, Channel

_PAUSE_S = 0.2  # seconds between two reports of progress
_UNUSABLE = 2  # exit status: what the worker needs on its own disk cannot be used


class Answers(Protocol):
    """Who answers frames: see `anyrank.worker.desk.Desk`."""

    def answer(self, frame: Frame, receive: Callable[[], Frame], progress: Callable[[Frame], None]) -> Iterator[Frame]: ...


def serve(channel: Channel, desk: Answers) -> int:
    """Answer frames until the channel ends, which ends the process. A `FrameError` ends it, too, and so does a lack of memory
    that is no client's."""
    try:
        while True:
            for reply in desk.answer(channel.receive(), channel.receive, channel.send):
                channel.send(reply)
    except FrameError as error:
        stopping.end(GONE, str(error))
    except MemoryError:
        stopping.end(memory.STATUS)
    except AnyRankError as error:  # a log or a store that cannot be written: nothing leaves, and the operator reads why
        stopping.end(_UNUSABLE, str(error))


def now_and_then(send: Callable[[Frame], None], hundredths: bool = False) -> Progress:
    """Progress as frames, at most one in `_PAUSE_S`. `hundredths`: how many examples there are is not said."""
    last = [0.0]

    def report(done: int, total: int) -> None:
        if time.monotonic() - last[0] >= _PAUSE_S:
            last[0] = time.monotonic()
            send(calls.progress_frame(*((100 * done // max(total, 1), 100) if hundredths else (done, total))))

    return report
