"""Clients in worker processes on this machine. The server's process has neither data nor base model.

A worker loads the task once, trains one client after another, and scores models. Every worker can train every client, and what
it is sent has all that it needs, also what stays with a client on real sites: one that dies costs the replies that it owes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from anyrank.adapter.adapter import Adapter
from anyrank.engines.posts import Posts, Work
from anyrank.errors import FrameError, RunFailed
from anyrank.messages import calls
from anyrank.messages.frame import Frame, to_bytes
from anyrank.messages.plan import Plan
from anyrank.messages.records import BOTH, ClientUpdate, Code, Download, Failure, Job, Profile, Scaling, Scores
from anyrank.messages.scores import scores_of
from anyrank.messages.wire import download_frame, reply_of
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
        self._posts = Posts()

    def add(self, env: Mapping[str, str] | None = None) -> None:
        """One more worker, which starts when it is first needed. `env`: changes to its environment."""
        ways = {"env": env, "on_progress": self._reported, "load_s": self._whole_s, **self._limits}
        self._posts.add(Supervised(lambda: self._opening, self._opened, _MOST_BYTES, **ways))

    @property
    def ready(self) -> calls.Ready:
        """What the workers have loaded; the first one is started for it. Raises the errors of a run for a wrong request."""
        if self._ready is None:
            self._posts.open()
        return self._ready

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        return calls.adapter_of(self._ask(calls.start_frame(rank, scaling, seed)))[0]

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        return scores_of(self._ask(calls.adapter_frame(adapter, merged, calls.EVALUATE)))

    def train(
        self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None, deadline_s: float | None = None
    ) -> Iterator[ClientUpdate | Failure]:
        """Clients that train together in one process train together in one worker, so that the replies are the same. If that
        worker ends, they train one by one, so that only the client that ends it fails."""
        together = self.ready.together and mechanism is None and plan.config.accumulation_steps == 1
        asking = _Asking(plan, deadline_s, mechanism.table() if mechanism else None)
        alone = [[job] for job in jobs]
        groups = [list(jobs)] if together and len(jobs) > 1 else alone
        lost: list[list[Job]] = []
        known = {job.client.name: job for job in jobs}
        for name, found in self._carried_out(groups, asking, _TOGETHER if together else 1):
            if groups is not alone and isinstance(found, Failure):
                lost.append([known[name]])
            else:
                yield _read(known[name], found)
        for name, found in self._carried_out(lost, asking, 1):
            yield _read(known[name], found)

    def _carried_out(self, groups: Sequence[Sequence[Job]], asking: _Asking, deadlines: int) -> Iterator[tuple[str, Any]]:
        """For each client of `groups` its name, and its reply's frame or the failure of its worker."""
        works = [Work([job.client.name for job in group], partial(asking.frames, group)) for group in groups]
        limit_s = asking.deadline_s
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


@dataclass(frozen=True)
class _Asking:
    """What all clients of a round are asked with. `mechanism`: the table of the privacy mechanism, with its key."""

    plan: Plan
    deadline_s: float | None
    mechanism: Mapping[str, Any] | None

    def frames(self, group: Sequence[Job]) -> list[Frame]:
        downloads = [download_frame(_whole(job.download), self.plan, job.client, job.num_examples) for job in group]
        return [calls.cohort_frame(calls.Cohort(len(group), self.deadline_s, self.mechanism)), *downloads]


def _read(job: Job, found: Frame | Failure) -> ClientUpdate | Failure:
    """The reply to a job. A frame that is none costs the client's reply, as everything does that is a client's."""
    if isinstance(found, Failure):
        return found
    try:
        return reply_of(found, _whole(job.download))
    except FrameError as error:
        return Failure(job.client.name, Code.CRASHED, f"its worker sent what is no reply: {error}")


def _digest(ready: calls.Ready) -> bytes:
    return to_bytes(calls.ready_frame(replace(ready, memory=0)))[-32:]
