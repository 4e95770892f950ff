"""Clients in worker processes on this machine. The server's process has neither data nor base model.

A worker loads the task once, trains one client after another, and scores models. Every worker can train every client, and what
it is sent has all that it needs, also what stays with a client on real sites: one that dies costs the replies that it owes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from anyrank.adapter.adapter import Adapter
from anyrank.engines.inbox import Inbox
from anyrank.engines.posts import Posts, Work
from anyrank.errors import RunFailed
from anyrank.messages import calls, spooled
from anyrank.messages.frame import Frame, to_bytes
from anyrank.messages.plan import Plan
from anyrank.messages.records import BOTH, ClientUpdate, Download, Failure, Job, Profile, Reported, Scaling, Scores
from anyrank.messages.scores import scores_of
from anyrank.messages.wire import FAILURE, counts_of, download_frame, failure_of
from anyrank.privacy.noise import Mechanism
from anyrank.progress import Progress
from anyrank.worker.supervisor import Died, Late, Supervised

_MOST_BYTES = 1 << 40  # of a reply: the workers are our own
_FACTOR, _MORE_S = 1.25, 10.0  # a worker ends its clients' training itself; after this part of the deadline and more it hangs
_STARTS = 5  # attempts to score a model, each with a worker that was started anew


class Workers:
    """The engine over supervised workers. `ready`: what they have loaded, which is the same in all of them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        largest_rank: int,
        progress: Progress | None = None,
        envs: Sequence[Mapping[str, str]] = ({},),
    ) -> None:
        """`config`: the table of the configuration; `envs`: changes to the environment of each worker."""
        self._opening, self._progress = calls.setup_frame(config, largest_rank), progress
        self._lock = threading.Lock()
        self._ready: calls.Ready | None = None
        self._posts, self._inbox = Posts(), Inbox()
        for env in envs:
            self.add(env)

    def add(self, env: Mapping[str, str]) -> None:
        """One more worker, which starts when it is first needed."""
        made = Supervised(
            lambda: self._opening, self._opened, _MOST_BYTES, env, on_progress=self._reported, receive=self._inbox
        )
        self._posts.add(made)

    @property
    def ready(self) -> calls.Ready:
        """What the workers have loaded; the first one is started for it. Raises the errors of a run for a wrong request."""
        if self._ready is None:
            self._first(lambda worker: worker.start())
        return self._ready

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
        """Clients that train together in one process train together in one worker, so that the replies are the same."""
        together = self.ready.together and mechanism is None and plan.config.accumulation_steps == 1
        groups = [list(jobs)] if together and jobs else [[job] for job in jobs]
        table = mechanism.table() if mechanism else None
        known = {job.client.name: job for job in jobs}
        with self._inbox.open():
            for found in self._carried(groups, plan, calls.Cohort(1, deadline_s, table, score)):
                if isinstance(found, Failure):
                    yield found
                else:
                    yield spooled.reply_of(found, _whole(known[found.header.client].download))

    def score(self, jobs: Sequence[Job], plan: Plan, deadline_s: float | None = None) -> Iterator[Reported | Failure]:
        for found in self._carried([[job] for job in jobs], plan, calls.Cohort(1, deadline_s, score=True, train=False)):
            if isinstance(found, Failure):
                yield found
            else:
                yield failure_of(found) if found.header.kind == FAILURE else counts_of(found)

    def _carried(self, groups: Sequence[Sequence[Job]], plan: Plan, wanted: calls.Cohort) -> Iterator[Frame | Failure]:
        """What the workers reply to the jobs of each group, of which `wanted` says what is wanted."""
        frames = partial(_frames, plan=plan, wanted=wanted, inbox=self._inbox)
        works = [Work([job.client.name for job in group], partial(frames, group)) for group in groups]
        timeout_s = None if wanted.deadline_s is None else wanted.deadline_s * _FACTOR + _MORE_S
        for reply in self._posts.carry_out(works, timeout_s):
            yield reply.found

    def profile(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Profile:
        raise RunFailed("run.engine = 'workers': one step is measured with run.engine = 'process'")

    def close(self) -> None:
        self._posts.close()

    # --- asking one worker, whichever answers ---

    def _ask(self, frame: Frame) -> Frame:
        reply = self._first(lambda worker: next(worker.ask([frame], 1)))
        if reply.header.kind == calls.ERROR:
            raise calls.error_of(reply)
        return reply

    def _first(self, ask: Any) -> Any:
        """What the first worker says; started anew, and asked again, if it dies."""
        for _ in range(_STARTS):
            try:
                return ask(self._posts.all[0].worker)
            except (Died, Late) as error:
                reason = str(error)
        raise RunFailed(f"worker: {_STARTS} attempts, each without a reply: {reason}")

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
        if self._progress:
            self._progress(*calls.progress_of(frame))


def _whole(download: Download) -> Download:
    """The download with nothing left out: the workers keep nothing."""
    return replace(download, send=BOTH, private=frozenset())


def _frames(group: Sequence[Job], plan: Plan, wanted: calls.Cohort, inbox: Inbox) -> list[Frame]:
    for job in group:
        inbox.expect(_whole(job.download), in_memory=bool(job.download.private))
    downloads = [download_frame(_whole(job.download), plan, job.client, job.num_examples) for job in group]
    return [calls.cohort_frame(replace(wanted, jobs=len(group))), *downloads]


def _digest(ready: calls.Ready) -> bytes:
    return to_bytes(calls.ready_frame(replace(ready, memory=0)))[-32:]
