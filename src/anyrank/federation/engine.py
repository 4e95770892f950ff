"""What the round loop asks of an engine, whatever it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from anyrank.adapter.adapter import Adapter
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Failure, Job, Profile, Scaling, Scores
from anyrank.privacy.noise import Mechanism


class Engine(Protocol):
    """Runs clients and scores models, wherever they are. It knows data and hardware, and nothing of methods.

    Its laws, by which the loop stands:

    * at most one reply a job, in any order; a reply names the job's client;
    * nothing that a client does raises: whatever goes wrong with one is its `Failure`;
    * the same jobs, plan and mechanism give the same replies, bit for bit;
    * a job's download is asked for when it is sent, and not before;
    * after `close` nothing of the run is held, and the model is as it was. Closing twice is closing once.
    """

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        """The adapter that a run starts from, at `rank`."""
        ...

    def train(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Iterator[ClientUpdate | Failure]:
        """The replies to `jobs`. `mechanism`: the privacy plan with its key, from whoever keeps the ledger; `None` without."""
        ...

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        """How base model, merged sum and adapter do on the held-out examples."""
        ...

    def profile(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Profile:
        """What one local step of each job takes. Raises `RunFailed` where one cannot be made."""
        ...

    def close(self) -> None: ...
