"""The interface between the round loop and an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from anyrank.adapter.adapter import Adapter
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Failure, Job, Profile, Reported, Scaling, Scores, Unreadable
from anyrank.privacy.noise import Mechanism


class Engine(Protocol):
    """Runs clients and scores models, wherever they are. It knows data and hardware, but no methods.

    The loop relies on these rules:

    * there is at most one reply per job, in any order; a reply names the job's client;
    * nothing that a client does raises an exception: any problem of a client becomes its `Failure`;
    * the same jobs, plan and mechanism give the same replies, bit for bit;
    * a job's download is built when it is sent, not earlier;
    * after `close`, nothing of the run is kept, and the model is as it was before. `close` may be called twice.
    """

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        """The adapter that a run starts from, at `rank`."""
        ...

    def train(
        self,
        jobs: Sequence[Job],
        plan: Plan,
        mechanism: Mechanism | None = None,
        deadline_s: float | None = None,
        score: bool = False,
    ) -> Iterator[ClientUpdate | Failure | Unreadable]:
        """The replies to `jobs`. `mechanism`: the privacy plan with its key, or `None`. `deadline_s`: seconds that a client has
        from its download to its reply (`None`: no limit); one that takes longer is a `Failure` with the code `LATE`. `score`:
        each client that has held-out examples also scores what it downloads, before it trains (`ClientUpdate.counts`); it is
        given only for `eval.where = "sites"`."""
        ...

    def score(
        self, jobs: Sequence[Job], plan: Plan, deadline_s: float | None = None
    ) -> Iterator[Reported | Failure | Unreadable]:
        """The same scores, of clients that do not train; only for `eval.where = "sites"`."""
        ...

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        """The scores of base model, merged sum and adapter on the held-out examples."""
        ...

    def profile(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Profile:
        """The cost of one local step of each job. Raises `RunFailed` if a step is not possible."""
        ...

    def close(self) -> None: ...
