"""What the round loop asks of an engine, whatever it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from anyrank.adapter import Adapter
from anyrank.local import Plan
from anyrank.records import Client, ClientUpdate, Download, Failure, Scaling
from anyrank.tasks.base import Scores


@dataclass(frozen=True)
class Job:
    """One client's work in one round: who, on how many examples (by the server's own record), and from what."""

    index: int
    client: Client
    num_examples: int
    download: Download


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
