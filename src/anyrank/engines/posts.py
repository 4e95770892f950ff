"""Supervised workers that are asked at the same time: each has a thread, and all report to one queue.

Workers start when there is work that the others are too few for, and get work when they have loaded: a run goes on while
further workers load, and while one loads again that has died.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from anyrank.errors import RunFailed
from anyrank.messages import calls
from anyrank.messages.frame import Frame
from anyrank.messages.records import Code, Failure
from anyrank.worker.supervisor import Died, Late, Supervised

_ATTEMPTS = 3  # to load, in a row, after which a worker is given up while there are others
_PATIENCE_S = 30.0  # for a thread to end whose worker has been closed


@dataclass(eq=False)
class Work:
    """One question: of each of the clients `names`, one reply is expected. `frames` are built when they are sent, in the thread
    of the caller. `post`: who is asked, if it is not all the same. `replies`: gives the most bytes of its replies together."""

    names: Sequence[str]
    frames: Callable[[], Sequence[Frame]]
    post: Post | None = None
    replies: Callable[[], int] = lambda: 0
    owed: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.owed = set(self.names)


class Reply(NamedTuple):
    """What came for a client: a frame, or a failure of its worker."""

    work: Work
    found: Frame | Failure


class Posts:
    """The workers of one engine. One thread at a time may use it.

    `most`: as many are asked at the same time, 0 for all. `most_bytes`: further ones are asked while those that are have fewer
    bytes of questions and replies together; 0 without a limit.
    """

    def __init__(self, most: int = 0, most_bytes: int = 0) -> None:
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._loading: set[Post] = set()
        self._busy: dict[Post, Work] = {}
        self._taken: dict[Post, int] = {}  # bytes of what a worker is asked, and of its replies
        self._most, self._most_bytes = most, most_bytes
        self.all: list[Post] = []

    def add(self, worker: Supervised) -> Post:
        self.all.append(Post(worker, self._events))
        return self.all[-1]

    def open(self) -> None:
        """Load the first worker. Raises `RunFailed` if it dies each time, and what it reports."""
        reason = ""
        for _ in range(_ATTEMPTS):
            self._load(self.all[0])
            event = self._settled(self._events.get())
            if not event.reason:
                return
            reason = event.reason
        raise RunFailed(f"worker: {_ATTEMPTS} attempts to start one: {reason}")

    def carry_out(self, works: Sequence[Work], timeout_s: float | None = None, every: bool = False) -> Iterator[Reply]:
        """One reply for each client of `works`, as they come; `timeout_s`: seconds for each. `every`: all are asked at the same
        time, whatever the limits.

        An error that a worker reports, or that comes up while one is opened, is raised: it is none of a client's. A worker that
        cannot be loaded costs nothing while there is another, or else the replies that are asked of it. If the caller leaves
        early, the workers that are still busy are ended.
        """
        if not self.all:
            raise RunFailed("workers: expected at least one, got none; they have been closed")
        waiting, busy = list(works), self._busy
        try:
            while waiting or busy:
                self._hand_out(waiting, timeout_s, every)
                event = self._events.get()
                if event.reply is not None:
                    busy[event.post].owed.discard(event.reply.header.client)
                    yield Reply(busy[event.post], event.reply)
                elif event.post in busy:
                    work = busy.pop(event.post)
                    if event.broken is not None:
                        raise event.broken
                    yield from _failures([work], event)
                elif self._settled(event).reason:
                    yield from _failures(self._hopeless(waiting, event.post), event)
        except BaseException:
            self._break_off()
            raise

    def _break_off(self) -> None:
        """End the workers that are busy or load, and wait until they have ended."""
        for post in {*self._busy, *self._loading}:
            post.worker.kill()
        while self._busy or self._loading:
            event = self._events.get()
            if event.reply is None:
                self._busy.pop(event.post, None)
                self._loading.discard(event.post)

    def close(self) -> None:
        """End all workers at the same time."""
        for post in self.all:
            post.dismiss(busy=post in self._loading or post in self._busy)
        for post in self.all:
            post.thread.join(_PATIENCE_S)
        self.all, self._loading, self._busy = [], set(), {}

    def _hand_out(self, waiting: list[Work], timeout_s: float | None, every: bool) -> None:
        """Give works to the workers that are loaded, and let as many others load as there are works left."""
        cold = []
        for post in self.all:
            work = next((work for work in waiting if work.post in (None, post)), None)
            if work is None or post in self._busy or post in self._loading:
                continue
            if post.worker.pid is None:
                cold.append(post)
                continue
            if not every and self._is_full():
                continue
            frames = work.frames()
            waiting.remove(work)
            self._busy[post] = work
            self._taken[post] = sum(frame.array_bytes for frame in frames) + work.replies()
            post.give(frames, work.names, timeout_s)
        others = [post for post in cold if post.attempts < _ATTEMPTS]
        chosen = others if others or self._busy or self._loading else cold
        more = sum(work.post is None for work in waiting) - len(self._loading)
        for post in cold:
            if any(work.post is post for work in waiting):
                self._load(post)
            elif more > 0 and post in chosen:
                self._load(post)
                more -= 1

    def _is_full(self) -> bool:
        """Whether nobody else is asked now. Whoever is asked alone may be asked for anything."""
        taken = sum(self._taken[post] for post in self._busy)
        return bool(self._busy) and (0 < self._most <= len(self._busy) or 0 < self._most_bytes <= taken)

    def _load(self, post: Post) -> None:
        self._loading.add(post)
        post.load()

    def _settled(self, event: _Event) -> _Event:
        """Note that a worker has loaded, or that it has not."""
        self._loading.discard(event.post)
        if event.broken is not None:
            raise event.broken
        event.post.attempts = event.post.attempts + 1 if event.reason else 0
        return event

    def _hopeless(self, waiting: list[Work], post: Post) -> list[Work]:
        """The works that nobody can do after `post` has failed to load, and that no longer wait: its own; or all of them, if
        there is nobody else and it has failed too often."""
        alone = not self._busy and not self._loading and all(each.attempts >= _ATTEMPTS for each in self.all)
        lost = [work for work in waiting if work.post is post or (work.post is None and alone)]
        waiting[:] = [work for work in waiting if work not in lost]
        if alone:  # they are tried anew when they are needed again
            for each in self.all:
                each.attempts = 0
        return lost


def _failures(works: Sequence[Work], event: _Event) -> Iterator[Reply]:
    """The replies that are still owed, as failures of the worker."""
    for work in works:
        for name in sorted(work.owed):
            yield Reply(work, Failure(name, event.code, event.reason))


class _Event(NamedTuple):
    """What a worker has done: a `reply`; or all that it was asked, or its end, with the `code` and `reason` of the replies that
    are missing; or an error that is none of its clients'."""

    post: Post
    reply: Frame | None = None
    code: Code = Code.CRASHED
    reason: str = ""
    broken: BaseException | None = None


class _Task(NamedTuple):
    """What a worker's thread is to do: to ask `frames`, if there are any, for replies of the clients in `owed`."""

    frames: Sequence[Frame] = ()
    owed: Sequence[str] = ()
    timeout_s: float | None = None


class Post:
    """A worker, and the thread that asks it. `attempts`: how often in a row it could not be loaded."""

    def __init__(self, worker: Supervised, events: queue.SimpleQueue[_Event]) -> None:
        self.worker, self._events, self.attempts = worker, events, 0
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self.thread.start()

    def load(self) -> None:
        """Start the worker and let it load. What came of it is an event."""
        self.worker.revive()
        self._tasks.put(_Task())

    def give(self, frames: Sequence[Frame], names: Sequence[str], timeout_s: float | None) -> None:
        self.worker.revive()
        self._tasks.put(_Task(frames, names, timeout_s))

    def dismiss(self, busy: bool) -> None:
        """Let the worker end, and then the thread."""
        if busy:
            self.worker.kill()
        self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._events.put(self._done(task))
        self.worker.close()

    def _done(self, task: _Task) -> _Event:
        try:
            self.worker.start()
            return self._asked(task) if task.frames else _Event(self)
        except Died as error:
            code = Code.OUT_OF_MEMORY if error.out_of_memory else Code.CRASHED
            return _Event(self, code=code, reason=f"its worker ended: {error}")
        except Late:
            what = "hung" if task.frames else "did not load in time"
            return _Event(self, code=Code.LATE, reason=f"its worker {what}, and was ended (rounds.deadline_s)")
        except BaseException as error:  # of a worker that was started anew, or of ours: it ends the run
            return _Event(self, broken=error)

    def _asked(self, task: _Task) -> _Event:
        owed = set(task.owed)
        for reply in self.worker.ask(task.frames, len(owed), task.timeout_s):
            if reply.header.kind == calls.ERROR:
                return _Event(self, broken=calls.error_of(reply))
            if reply.header.client not in owed:
                self.worker.end()
                return _Event(self, reason="its worker sent a reply that it was not asked for, and was ended")
            owed.discard(reply.header.client)
            self._events.put(_Event(self, reply))
        return _Event(self)
