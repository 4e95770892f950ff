"""What comes back in a round: each reply is judged, and each client gets a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from anyrank.errors import RunFailed
from anyrank.federation import guard
from anyrank.messages.records import Client, ClientUpdate, Failure, Job
from anyrank.privacy.ledger import SPENT, Ledger, Unlimited


class Skipped(NamedTuple):
    """A client of a cohort that has nothing to do in the round, and why."""

    client: Client
    num_examples: int
    reason: str


@dataclass
class Collected:
    """What came back in one round: updates that entered it, and a log row for each client of the cohort."""

    updates: list[ClientUpdate] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def count(self, *statuses: str) -> int:
        return sum(row["status"] in statuses for row in self.rows)


def charge(
    ledger: Ledger | Unlimited, jobs: Sequence[Job], skipped: Sequence[Skipped], round: int
) -> tuple[list[Job], list[Skipped]]:
    """The jobs that privacy budgets leave, each charged for; the others join the skipped."""
    left, spent = [], []
    for job in jobs:
        if ledger.has_left(job.client.name, round):
            left.append(job)
        else:
            spent.append(Skipped(job.client, job.num_examples, SPENT))
    ledger.charge(round, {job.client.name: job.num_examples for job in left})
    return left, [*skipped, *spent]


def collect(replies, jobs: Sequence[Job], skipped: Sequence[Skipped], round: int, bound: float = math.inf) -> Collected:
    """Pass each reply through the guard. One bad client costs one client; a round in which all fail ends the run."""
    collected, by_name = Collected(), {job.client.name: job for job in jobs}
    for reply in replies:
        job = by_name.pop(reply.client, None)
        if job is None:
            raise RunFailed(f"round {round}: a reply from {reply.client or 'nobody'}, who is not (or no longer) awaited")
        collected.rows.append(_judge(reply, job, collected.updates, bound) | {"round": round})
    for job in by_name.values():
        collected.rows.append(_row(job.client, job.num_examples, "failed", "sent nothing") | {"round": round})
    for client, num_examples, reason in skipped:
        collected.rows.append(_row(client, num_examples, "skipped", reason) | {"round": round})
    collected.rows.sort(key=lambda row: row["client"])
    if jobs and not collected.updates:
        worst = next(row for row in collected.rows if row["status"] in ("failed", "rejected"))
        raise RunFailed(f"round {round}: no client sent a usable update; {worst['client']}: {worst['reason']}")
    return collected


def _judge(reply: ClientUpdate | Failure, job: Job, updates: list[ClientUpdate], bound: float) -> dict[str, Any]:
    if isinstance(reply, Failure):
        return _row(job.client, job.num_examples, "failed", reply.reason)
    try:
        updates.append(guard.admit(reply, job.download, job.client.name, job.num_examples, bound))
    except guard.Rejected as reason:
        return _row(job.client, job.num_examples, "rejected", str(reason))
    return _row(job.client, job.num_examples, "ok", "") | {key: reply.metrics.get(key) for key in ("loss", "seconds")}


def _row(client: Client, num_examples: int, status: str, reason: str) -> dict[str, Any]:
    figures = {"num_examples": num_examples, "loss": None, "seconds": None}
    return {"round": 0, "client": client.name, "rank": client.rank, **figures, "status": status, "reason": reason}
