"""Which clients are asked in a round, and why others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from anyrank.federation.federation import Federation
from anyrank.federation.quarantine import Quarantine
from anyrank.messages.records import Client, Job, ServerState
from anyrank.privacy.ledger import SPENT, Ledger, Unlimited


class Skipped(NamedTuple):
    """A client of a cohort that does not train in the round, and the reason."""

    client: Client
    num_examples: int
    reason: str


@dataclass(frozen=True)
class Work:
    """The work of a round: all `jobs` that count for it; those of the clients that are `asked`; those of the clients that are
    `answering`, which do not drop out; and the clients that are `skipped`.
    """

    jobs: Sequence[Job]
    asked: Sequence[Job]
    answering: Sequence[Job]
    skipped: Sequence[Skipped]


def ask(federation: Federation, ledger: Ledger | Unlimited, quarantine: Quarantine, state: ServerState) -> Work:
    """The work of the round after `state`. Privacy budgets are charged before anybody trains: for each client that has budget
    left, also for one that rests or drops out, so that what is charged depends on public values only.
    """
    round = state.round + 1
    jobs, skipped = charge(ledger, *dispatch(federation, state, round), round)
    asked, resting = present(quarantine, jobs, round)
    answering = [job for job in asked if not federation.drops_out(job.client.name, round)]
    return Work(jobs, asked, answering, [*skipped, *resting])


def dispatch(federation: Federation, state: ServerState, round: int) -> tuple[list[Job], list[Skipped]]:
    """The jobs of the round's cohort, and the clients that have no examples to train on."""
    jobs, without, population = [], [], federation.population
    for index in population.draw(round):
        client, count = population.client(index), federation.counted(int(population.sizes[index]))
        if count:
            jobs.append(Job(client, count, partial(federation.method.dispatch, state, client)))
        else:
            without.append(Skipped(client, 0, "has no examples"))
    return jobs, without


def present(quarantine: Quarantine, jobs: Sequence[Job], round: int) -> tuple[list[Job], list[Skipped]]:
    """The jobs of the clients that are asked in the round, and those that rest."""
    asked, resting = [], []
    for job in jobs:
        if reason := quarantine.reason(job.client.name, round):
            resting.append(Skipped(job.client, job.num_examples, reason))
        else:
            asked.append(job)
    return asked, resting


def charge(
    ledger: Ledger | Unlimited, jobs: Sequence[Job], skipped: Sequence[Skipped], round: int
) -> tuple[list[Job], list[Skipped]]:
    """The jobs that privacy budgets allow, each charged; the other clients are skipped."""
    left, spent = [], []
    for job in jobs:
        if ledger.has_left(job.client.name, round):
            left.append(job)
        else:
            spent.append(Skipped(job.client, job.num_examples, SPENT))
    ledger.charge(round, {job.client.name: job.num_examples for job in left})
    return left, [*skipped, *spent]
