"""What the round loop asks of an engine, whatever it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from anyrank.adapter.adapter import Adapter
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Failure, Job, Scaling, Scores


class Engine(Protocol):
    """Runs clients and scores models. It knows data and hardware, and nothing of methods."""

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        """The adapter that a run starts from, at `rank`."""
        ...

    def train(self, jobs: Sequence[Job], plan: Plan) -> Iterator[ClientUpdate | Failure]:
        """One reply a job, in any order. A client that fails yields a `Failure`; nothing it does ends the round."""
        ...

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        """How base model, merged sum and adapter do on the held-out examples."""
        ...
