"""Clients in worker processes on this machine. The server's process has neither data nor base model.

A worker loads the task once, trains one client after another, and scores models. Every worker can train every client, and what
it is sent has all that it needs, also what stays with a client on real sites: one that dies costs the replies that it owes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from anyrank.adapter.adapter import Adapter
from anyrank.engines.inbox import Inbox
from anyrank.engines.posts import Posts, Work
from anyrank.errors import FrameError, RunFailed
from anyrank.messages import calls, spooled
from anyrank.messages.frame import Frame, to_bytes
from anyrank.messages.plan import Plan
from anyrank.messages.records import BOTH, ClientUpdate, Code, Download, Failure, Job, Profile, Reported, Scaling, Scores
from anyrank.messages.scores import scores_of
from anyrank.messages.wire import FAILURE, counts_of, download_frame, failure_of
from anyrank.privacy.noise import Mechanism
from anyrank.progress import Progress
from anyrank.worker.supervisor import Supervised

_MOST_BYTES = 1 << 40  # of a reply: the workers are our own
_FACTOR, _MORE_S = 1.25, 10.0  # a worker ends its clients' training itself; after this part of the deadline and more it hangs
_TOGETHER = 2  # deadlines that may pass until a stack replies: it is given up after one, and its clients train one by one
_WHOLE, _WHOLE_S = 10, 600.0  # deadlines, and seconds at least, for what is no client's: to load, and to score
_ATTEMPTS = 5  # to score a model, each with a worker that was started anew


class Workers:
    """The engine over supervised workers. `ready`: what they have loaded, which is the same in all of them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        largest_rank: int,
        progress: Progress | None = None,
        deadline_s: float | None = None,
        **limits: Any,
    ) -> None:
        """`config`: the table of the configuration; `deadline_s`: that of its rounds. With a deadline, loading and scoring have
        a limit too. `limits`: `most_memory` and `refuse` of each worker, as `Supervised` has them.
        """
        self._opening, self._progress, self._limits = calls.setup_frame(config, largest_rank), progress, limits
        self._whole_s = None if deadline_s is None else max(_WHOLE * deadline_s, _WHOLE_S)
        self._lock = threading.Lock()
        self._ready: calls.Ready | None = None
        self._posts, self._inbox = Posts(), Inbox()

    def add(self, env: Mapping[str, str] | None = None) -> None:
        """One more worker, which starts when it is first needed. `env`: changes to its environment."""
        ways = {"env": env, "on_progress": self._reported, "load_s": self._whole_s, "receive": self._inbox, **self._limits}
        self._posts.add(Supervised(lambda: self._opening, self._opened, _MOST_BYTES, **ways))

    @property
    def ready(self) -> calls.Ready:
        """What the workers have loaded; the first one is started for it. Raises the errors of a run for a wrong request."""
        if self._ready is None:
            self._posts.open()
        return self._ready

    @property
    def held(self) -> dict[str, str]:
        """Digests of what the workers of a private run hold in memory: it continues with the same."""
        return json.loads(self.ready.base_digest)

    def keep_in(self, folder: Path) -> None:
        """Keep large replies in a file in `folder` until they are merged, not in memory."""
        self._inbox.folder = folder

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        with self._inbox.open():
            return spooled.adapter_of(self._ask(calls.start_frame(rank, scaling, seed)))

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        return scores_of(self._ask(calls.adapter_frame(adapter, merged, calls.EVALUATE)))

    def train(
        self,
        jobs: Sequence[Job],
        plan: Plan,
        mechanism: Mechanism | None = None,
        deadline_s: float | None = None,
        score: bool = False,
    ) -> Iterator[ClientUpdate | Failure]:
        """Clients that train together in one process train together in one worker, so that the replies are the same. If that
        worker ends, they train one by one, so that only the client that ends it fails."""
        together = self.ready.together and mechanism is None and plan.config.accumulation_steps == 1
        wanted = calls.Cohort(1, deadline_s, mechanism.table() if mechanism else None, score)
        alone = [[job] for job in jobs]
        groups = [list(jobs)] if together and len(jobs) > 1 else alone
        lost: list[list[Job]] = []
        known = {job.client.name: job for job in jobs}
        with self._inbox.open():
            for name, found in self._carried_out(groups, plan, wanted, _TOGETHER if together else 1):
                if groups is not alone and isinstance(found, Failure):
                    lost.append([known[name]])
                else:
                    yield _read(known[name], found, spooled.reply_of)
            for name, found in self._carried_out(lost, plan, wanted, 1):
                yield _read(known[name], found, spooled.reply_of)

    def score(self, jobs: Sequence[Job], plan: Plan, deadline_s: float | None = None) -> Iterator[Reported | Failure]:
        known = {job.client.name: job for job in jobs}
        wanted = calls.Cohort(1, deadline_s, score=True, train=False)
        with self._inbox.open():
            for name, found in self._carried_out([[job] for job in jobs], plan, wanted, 1):
                yield _read(known[name], found, _scored)

    def _carried_out(
        self, groups: Sequence[Sequence[Job]], plan: Plan, wanted: calls.Cohort, deadlines: int
    ) -> Iterator[tuple[str, Any]]:
        """For each client of `groups`, of which `wanted` says what is wanted, its name and its reply's frame, or the failure of
        its worker."""
        frames = partial(_frames, plan=plan, wanted=wanted, inbox=self._inbox)
        works = [Work([job.client.name for job in group], partial(frames, group)) for group in groups]
        limit_s = wanted.deadline_s
        timeout_s = None if limit_s is None else deadlines * limit_s * _FACTOR + _MORE_S
        for _, found in self._posts.carry_out(works, timeout_s):
            yield (found.client if isinstance(found, Failure) else found.header.client), found

    def profile(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Profile:
        raise RunFailed("run.engine = 'workers': one step is measured with run.engine = 'process'")

    def close(self) -> None:
        self._posts.close()

    # --- asking one worker, whichever answers ---

    def _ask(self, frame: Frame) -> Frame:
        """The reply of a worker, whichever has time; of another one, or one started anew, if that one ends."""
        for _ in range(_ATTEMPTS):
            ((_, found),) = self._posts.carry_out([Work([frame.header.client], lambda: [frame])], self._whole_s)
            if not isinstance(found, Failure):
                return found
        raise RunFailed(f"{frame.header.kind}: {_ATTEMPTS} attempts, each without a reply: {found}")

    def _opened(self, reply: Frame) -> None:
        if reply.header.kind == calls.ERROR:
            raise calls.error_of(reply)
        ready = calls.ready_of(reply)
        with self._lock:
            if self._ready is None:
                self._ready = ready
            elif _digest(ready) != _digest(self._ready):
                raise RunFailed(
                    "workers: expected the same task in all of them, got another one in a worker that was started later; a "
                    "data file or the base model has changed; go on by --resume, which names it"
                )

    def _reported(self, frame: Frame) -> None:
        if self._progress and self._ready is None:
            self._progress(*calls.progress_of(frame))


def _whole(download: Download) -> Download:
    """The download with nothing left out: the workers keep nothing."""
    return replace(download, send=BOTH, private=frozenset())


def _frames(group: Sequence[Job], plan: Plan, wanted: calls.Cohort, inbox: Inbox) -> list[Frame]:
    for job in group:
        inbox.expect(_whole(job.download), in_memory=bool(job.download.private))
    downloads = [download_frame(_whole(job.download), plan, job.client, job.num_examples) for job in group]
    return [calls.cohort_frame(replace(wanted, jobs=len(group))), *downloads]


def _read(job: Job, found: Frame | Failure, read: Callable[[Frame, Download], Any]) -> Any:
    """The reply to a job. A frame that is none costs the client's reply, as everything does that is a client's."""
    if isinstance(found, Failure):
        return found
    try:
        return read(found, _whole(job.download))
    except FrameError as error:
        return Failure(job.client.name, Code.CRASHED, f"its worker sent what is no reply: {error}")


def _scored(frame: Frame, download: Download) -> Reported | Failure:
    return failure_of(frame) if frame.header.kind == FAILURE else counts_of(frame)


def _digest(ready: calls.Ready) -> bytes:
    return to_bytes(calls.ready_frame(replace(ready, memory=0)))[-32:]
