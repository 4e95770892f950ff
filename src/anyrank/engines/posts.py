"""Supervised workers that are asked at the same time: each has a thread, and all report to one queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from anyrank.messages import calls
from anyrank.messages.frame import Frame
from anyrank.messages.records import Code, Failure
from anyrank.worker.supervisor import Died, Late, Supervised


@dataclass(eq=False)
class Work:
    """One question: of each of the clients `names`, one reply is expected. `frames` are built when they are sent, in the thread
    of the caller. `post`: who is asked, if it is not all the same."""

    names: Sequence[str]
    frames: Callable[[], Sequence[Frame]]
    post: Post | None = None
    owed: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.owed = set(self.names)


class Reply(NamedTuple):
    """What came for a client: a frame, or a failure of its worker."""

    work: Work
    found: Frame | Failure


class Posts:
    """The workers of one engine. One thread at a time may use it."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self.all: list[Post] = []

    def add(self, worker: Supervised) -> Post:
        self.all.append(Post(worker, self._events))
        return self.all[-1]

    def carry_out(self, works: Sequence[Work], timeout_s: float | None = None) -> Iterator[Reply]:
        """One reply for each client of `works`, as they come; `timeout_s`: seconds for each.

        An error that a worker reports, or that comes up while one is opened, is raised: it is none of a client's. If the caller
        leaves early, the workers that are still busy are ended.
        """
        waiting, idle = list(works), list(self.all)
        busy: dict[Post, Work] = {}
        try:
            while waiting or busy:
                for work, post in _matched(waiting, idle):
                    frames = work.frames()
                    waiting.remove(work)
                    idle.remove(post)
                    busy[post] = work
                    post.give(frames, len(work.names), timeout_s)
                event = self._events.get()
                if event.reply is not None:
                    work = busy[event.post]
                    work.owed.discard(event.reply.header.client)
                    yield Reply(work, event.reply)
                    continue
                work = busy.pop(event.post)
                idle.append(event.post)
                if event.broken is not None:
                    raise event.broken
                for name in sorted(work.owed):
                    yield Reply(work, Failure(name, event.code, event.reason))
        finally:
            for post in busy:
                post.worker.kill()
            while busy:
                event = self._events.get()
                if event.reply is None:
                    busy.pop(event.post)

    def close(self) -> None:
        for post in self.all:
            post.close()
        self.all = []


def _matched(waiting: Sequence[Work], idle: Sequence[Post]) -> list[tuple[Work, Post]]:
    """The next works, each with a worker that is idle."""
    free, found = list(idle), []
    for work in waiting:
        if not free:
            break
        post = work.post or free[0]
        if post in free:
            free.remove(post)
            found.append((work, post))
    return found


class _Event(NamedTuple):
    """What a worker has done: a `reply`; or all that it was asked, or its end, with the `code` and `reason` of the replies that
    are missing; or an error that is none of its clients'."""

    post: Post
    reply: Frame | None = None
    code: Code = Code.CRASHED
    reason: str = "its worker sent fewer replies than it was asked for"
    broken: BaseException | None = None


class Post:
    """A worker, and the thread that asks it."""

    def __init__(self, worker: Supervised, events: queue.SimpleQueue[_Event]) -> None:
        self.worker, self._events = worker, events
        self._tasks: queue.SimpleQueue[tuple[Sequence[Frame], int, float | None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def give(self, frames: Sequence[Frame], replies: int, timeout_s: float | None) -> None:
        self._tasks.put((frames, replies, timeout_s))

    def close(self) -> None:
        self._tasks.put(None)
        self.worker.close()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._events.put(self._asked(*task))

    def _asked(self, frames: Sequence[Frame], replies: int, timeout_s: float | None) -> _Event:
        try:
            for reply in self.worker.ask(frames, replies, timeout_s):
                if reply.header.kind == calls.ERROR:
                    return _Event(self, broken=calls.error_of(reply))
                self._events.put(_Event(self, reply))
        except Died as error:
            return _Event(self, code=Code.CRASHED, reason=f"its worker ended: {error}")
        except Late:
            return _Event(self, code=Code.LATE, reason="its worker hung, and was ended (rounds.deadline_s)")
        except BaseException as error:  # of a worker that was started anew, or of ours: it ends the run
            return _Event(self, broken=error)
        return _Event(self)
