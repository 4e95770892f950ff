"""Clients at sites that keep their examples: one worker for each named site. The server has neither data nor base model.

A site is set up with a public configuration, and answers with what it is: its name, its numbers of examples, and facts about
its task. It gets real downloads, without what stays with it (FedSA's B and head) and without what follows from the seed
(FFA-LoRA's A), and sends what it trained. Failures have codes and no reasons.

The server takes the shapes of layers from the adapter that the sites start from. All sites must agree on it, number by number,
so that the base model's configuration is not needed here. FedSA's B and head never come here: `ServerState.extra` then holds,
for each such client, the A that it sent, with B and head as at the start. Nothing needs them: downloads leave B and head out,
and merges use A alone. A client's personal model is at its site only.

Sites are asked in waves, so that the server's memory does not grow with their number: as many at the same time as have
`IN_FLIGHT` bytes of downloads and replies together, or `most` at most.

A site whose worker ended costs its reply. It is set up again before its next job, and counts again once it has shown that it is
what it was. One that stays away fails in each round and delays none after the first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anyrank.adapter.adapter import Adapter
from anyrank.engines.inbox import Inbox
from anyrank.engines.posts import Post, Posts, Work
from anyrank.engines.roll import Joined, check_one, check_same, digest_of, roster_of, with_base
from anyrank.engines.seat import Make, Seat
from anyrank.errors import AnyRankError, FrameError, RunFailed, printable, shortened
from anyrank.messages import calls, spooled
from anyrank.messages.body import expect
from anyrank.messages.frame import Frame
from anyrank.messages.plan import Plan
from anyrank.messages.records import (
    BOTH,
    ClientUpdate,
    Code,
    Failure,
    Job,
    Profile,
    Reported,
    Scaling,
    Scores,
    Unreadable,
    factor_bytes,
    tensor_bytes,
)
from anyrank.messages.roster import Roster
from anyrank.messages.spooled import reply_limit
from anyrank.messages.wire import COUNTS, FAILURE, UPDATE, counts_of, download_frame, failure_of
from anyrank.privacy.noise import Mechanism

_FACTOR, _MORE_S = 1.25, 10.0  # a site ends its training itself; after this part of the deadline and more, its worker hangs
IN_FLIGHT = 2_000_000_000  # bytes of downloads and replies that are under way at once
_STARTS = 4  # sites that send the adapter which they start from at the same time
_PAUSE_S = 1.0  # between two attempts to reach the sites that are missing
_NOBODY = ""  # the client of an adapter's frame, which is none's

Reply = ClientUpdate | Reported | Failure | Unreadable


class Sites:
    """The engine over sites; `open` comes first."""

    def __init__(
        self,
        config: Mapping[str, Any],
        start: tuple[int, Scaling, int],
        sites: Mapping[str, Make],
        run: str = "",
        most: int = 0,
        most_bytes: int = IN_FLIGHT,
    ) -> None:
        """`config`: the table of the public configuration; `start`: rank, scaling and seed of the adapter that the run starts
        from; `sites[name]` makes the worker of a site; `run`: the name of the run in all frames. `most`, `most_bytes`: limits
        of what is under way in a round, as `Posts` has them."""
        self._run, self._start = run, start
        self._scored = config.get("privacy", {}).get("level", "none") == "none"  # else sites only keep what they are sent
        self._opening = calls.setup_frame(config, start[0], run)
        self._adapter: Adapter | None = None
        self._known: dict[str, Joined] = {}  # what each site said when it first came
        self._fresh: dict[str, calls.Ready] = {}  # of workers that were set up, and have not been checked since
        self._gone: set[str] = set()  # sites whose worker ended
        self._posts, self._inbox = Posts(most, most_bytes), Inbox()
        self._seats: dict[str, Seat] = {}
        self._post: dict[str, Post] = {}
        for name in sorted(sites):
            self._seats[name] = Seat(sites[name], lambda: self._opening, partial(self._opened, name), self._inbox)
            self._post[name] = self._posts.add(self._seats[name])

    def open(
        self,
        wait_s: float = 600.0,
        missing: Callable[[Sequence[str]], None] = lambda names: None,
        folder: Path | None = None,
    ) -> Roster:
        """The roster of all sites, once they are there and agree. `missing` is called with the names of those that are not yet.
        `folder`: where the adapter that they start from is kept, in a file without a name; without one, it is held in memory.

        All must come: a client's weight is its number of examples, which nobody else knows. Raises `RunFailed`, in one line, if
        one refuses, differs from the others, or does not come within `wait_s` seconds.
        """
        until, gate = time.monotonic() + wait_s, threading.BoundedSemaphore(_STARTS)
        for each in self._seats.values():
            each.gate = gate  # all load at the same time, and send their adapters in turn
        self._inbox.folder = folder
        try:
            with self._inbox.open(apart=True):
                self._open(until, wait_s, missing)
        finally:
            self._inbox.folder = None
            for each in self._seats.values():
                each.gate = contextlib.nullcontext()
        roster = roster_of(self._known)
        self._adapter = with_base(self._adapter, roster.facts.base_model)
        return roster

    def _open(self, until: float, wait_s: float, missing: Callable[[Sequence[str]], None]) -> None:
        while away := [name for name in self._seats if name not in self._known]:
            works = {Work([_NOBODY], lambda: [self._start_frame], self._post[name]): name for name in away}
            for reply in self._posts.carry_out(list(works), every=True):
                if not isinstance(reply.found, Failure):
                    self._started(works[reply.work], reply.found)
            for name in away:
                if refusal := self._seats[name].refusal:
                    raise RunFailed(f"site {name}: {str(refusal).removeprefix(f'site {name}: ')}")
            away = [name for name in away if name not in self._known]
            if away and time.monotonic() > until:
                raise RunFailed(f"sites: {', '.join(away)} did not come within {wait_s:g} s; start them, and the run again")
            if away:
                missing(away)
                time.sleep(_PAUSE_S)

    def keep_in(self, folder: Path) -> None:
        """Keep large replies in a file in `folder` until they are merged, not in memory."""
        self._inbox.folder = folder

    @property
    def agreed(self) -> dict[str, str]:
        """Digests of what all sites have in common, with which the run goes on."""
        first = self._known[min(self._known)]
        return {"base model": first.ready.base_digest, "start": first.start}

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        """The adapter that all sites start from. Raises `RunFailed` for another rank, scaling or seed than they were asked."""
        if self._adapter is None or (rank, scaling, seed) != self._start:
            raise RunFailed(f"sites: expected to start from {self._start}, got {(rank, scaling, seed)}")
        return self._adapter

    def train(
        self,
        jobs: Sequence[Job],
        plan: Plan,
        mechanism: Mechanism | None = None,
        deadline_s: float | None = None,
        score: bool = False,
    ) -> Iterator[ClientUpdate | Failure | Unreadable]:
        """The replies of the sites, as they come. `mechanism` is never sent: a site has its own ledger, key and noise."""
        return self._asked(jobs, plan, calls.Cohort(1, deadline_s, score=score), UPDATE)

    def score(
        self, jobs: Sequence[Job], plan: Plan, deadline_s: float | None = None
    ) -> Iterator[Reported | Failure | Unreadable]:
        return self._asked(jobs, plan, calls.Cohort(1, deadline_s, score=self._scored, train=False), COUNTS)

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        raise RunFailed("eval.where: the server has no held-out examples; use 'sites'")

    def profile(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Profile:
        raise RunFailed("sites: one step is measured with run.engine = 'process', on a machine that has the data")

    def close(self) -> None:
        self._posts.close()

    # --- a round ---

    def _asked(self, jobs: Sequence[Job], plan: Plan, wanted: calls.Cohort, kind: str) -> Iterator[Reply]:
        """One reply for each job, whatever the sites do."""
        works = {self._work(job, plan, wanted): job for job in jobs}
        timeout_s = None if wanted.deadline_s is None else wanted.deadline_s * _FACTOR + _MORE_S
        with self._inbox.open():
            yield from self._replies(works, timeout_s, plan, kind)

    def _replies(self, works: Mapping[Work, Job], timeout_s: float | None, plan: Plan, kind: str) -> Iterator[Reply]:
        answered = set()
        for reply in self._posts.carry_out(list(works), timeout_s):
            job, found = works[reply.work], reply.found
            name = job.client.name
            failed = isinstance(found, Failure)
            if not failed and found.header.kind == calls.ADAPTER and name in self._unchecked:
                self._started(name, found)
            elif (failed and found.client == _NOBODY) or name in answered:
                continue  # that it owes more than one reply, or that one came under another name, is one failure
            else:
                answered.add(name)
                yield self._reply(job, found, plan, kind)

    def _work(self, job: Job, plan: Plan, wanted: calls.Cohort) -> Work:
        """A site's job; a site that has not been checked since it was set up shows first what it starts from."""
        name = job.client.name
        first = [self._start_frame] if name in self._unchecked else []

        def frames() -> list[Frame]:
            self._inbox.expect(job.download, in_memory=bool(job.download.private))
            download = download_frame(job.download, plan, job.client, job.num_examples, self._run)
            return [*first, calls.cohort_frame(wanted, self._run), download]

        def replies() -> int:
            return reply_limit(job.download) + (self._start_bytes if first else 0)

        return Work([_NOBODY, name] if first else [name], frames, self._post[name], replies)

    def _reply(self, job: Job, found: Frame | Failure, plan: Plan, kind: str) -> Reply:
        name = job.client.name
        if isinstance(found, Failure):
            self._gone.add(name)
            return Failure(name, Code.REFUSED if self._seats[name].refusal else found.code)
        if name in self._unchecked:
            return Failure(name, Code.REFUSED)
        try:
            expect(found, kind, FAILURE, run=self._run, round=plan.round, client=name)
            if found.header.kind == FAILURE:
                return Failure(name, failure_of(found).code)
            return spooled.reply_of(found, job.download) if kind == UPDATE else counts_of(found)
        except FrameError as error:
            return Unreadable(name, str(error))

    # --- who is there ---

    @property
    def _start_frame(self) -> Frame:
        return calls.start_frame(*self._start, self._run)

    @property
    def _start_bytes(self) -> int:
        return factor_bytes(self._adapter, BOTH) + tensor_bytes(self._adapter) if self._adapter else 0

    @property
    def _unchecked(self) -> set[str]:
        return self._fresh.keys() | self._gone | (self._seats.keys() - self._known.keys())

    def _opened(self, name: str, frame: Frame) -> None:
        """Take in what a new worker says of itself; in the thread that started it. What it raises is the site's refusal."""
        if frame.header.kind == calls.ERROR:
            raise calls.error_of(frame)
        ready = calls.ready_of(frame)
        check_one(name, ready)
        self._fresh[name] = ready

    def _started(self, name: str, frame: Frame) -> None:
        """Take in the adapter that a site starts from. A site that is not what it was stays unchecked."""
        try:
            if frame.header.kind == FAILURE:  # what this server's disk refused
                raise RunFailed(f"the adapter that it starts from: {shortened(printable(str(failure_of(frame))), 300)}")
            adapter = spooled.adapter_of(frame)
            ready = self._fresh.get(name) or self._known[name].ready
            joined = Joined(ready, digest_of(adapter))
            check_same(name, self._known.get(name, joined), joined)
        except AnyRankError as error:
            self._seats[name].refusal = error
            return
        self._known.setdefault(name, joined)
        self._fresh.pop(name, None)
        self._gone.discard(name)
        if self._adapter is None:
            self._adapter = adapter
