"""When models are scored, and by whom: by the server's engine after a round, or by the clients before they train.

If clients score (`eval.where = "sites"`), a round's figures are those of the state that it started from, as the clients report
them that answered. The last state is scored in one exchange after the last round, in which nobody trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from anyrank.federation.federation import Federation
from anyrank.federation.figures import score
from anyrank.federation.intake import Collected
from anyrank.federation.quarantine import Quarantine
from anyrank.federation.reported import Reporting
from anyrank.federation.standing import Standing
from anyrank.messages.plan import Plan
from anyrank.messages.records import Counts, Job, Reported, ServerState
from anyrank.privacy.noise import Mechanism

_NONE = Standing(None, None)


def before(federation: Federation, first: ServerState) -> Standing:
    """The standing before round 1, as far as the server scores; without figures if it does not."""
    return score(federation, first) if federation.scored_here else _NONE


def replies(federation: Federation, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None) -> Iterator[Any]:
    """The replies to a round's `jobs`, with the clients' scores if they are wanted in this round."""
    engine, limit = federation.engine, federation.config.rounds.deadline_s or None
    if federation.wants_scores(plan.round):
        return engine.train(jobs, plan, mechanism, limit, score=True)
    return engine.train(jobs, plan, mechanism, limit)


def reported(federation: Federation, asked: Sequence[Job], collected: Collected) -> dict[str, Any]:
    """The entries of a round's metrics that the clients reported, in rounds in which they were asked to.

    `scored_round`: the round that led to the state that they scored; `scored_by`: how many of them count; `scored_of`: how many
    of those that were asked have held-out examples. A client counts if the guard admits its upload, and in time.
    """
    if not federation.wants_scores(collected.round):
        return {}
    with_examples = sum(federation.reporting.most(job.client.name) > 0 for job in asked)
    scores = {"scored_round": collected.round - 1, "scored_by": len(collected.counts), "scored_of": with_examples}
    return {**federation.reporting.standing(collected.counts).figures(), **scores}


@dataclass(frozen=True)
class Final:
    """The standing of the last state, and further entries of the summary."""

    standing: Standing
    entries: dict[str, Any]


def final(federation: Federation, state: ServerState, last: Standing | None, quarantine: Quarantine) -> Final:
    """The standing of the last `state`; `last`: it, if the last round has scored it already."""
    if federation.unscored:
        return Final(_NONE, {"unscored": federation.unscored})
    if not federation.reporting:
        return Final(last or score(federation, state), {})
    jobs = _jobs(federation, state, quarantine)
    plan = replace(federation.plan(state.round), round=state.round + 1)
    replies = federation.engine.score(jobs, plan, federation.config.rounds.deadline_s or None)
    found = _collected(replies, jobs, federation.reporting)
    entries = {"scored_by": len(found), "scored_of": len(jobs), "scoring_bytes": sum(map(_downloaded, jobs))}
    return Final(federation.reporting.standing(found), entries)


def _downloaded(job: Job) -> int:
    """Bytes of a job's download, which is not kept: memory holds one at a time."""
    size = job.download.download_bytes()
    job.settle()
    return size


def _jobs(federation: Federation, state: ServerState, quarantine: Quarantine) -> list[Job]:
    """What each client with held-out examples would download next, but for those that rest."""
    population, jobs = federation.population, []
    for index in range(len(population)):
        client, count = population.client(index), federation.counted(int(population.sizes[index]))
        if federation.reporting.most(client.name) and not quarantine.reason(client.name, state.round + 1):
            jobs.append(Job(client, count, partial(federation.method.dispatch, state, client)))
    return jobs


def _collected(replies: Iterable[Any], jobs: Sequence[Job], reporting: Reporting) -> dict[str, Counts]:
    """`{client: counts}` of the first reply of each client; of one that cannot be believed, nothing."""
    awaited, found = {job.client.name: job for job in jobs}, {}
    for reply in replies:
        try:
            name = reply.client
            if type(name) is str and name in awaited:
                awaited.pop(name).settle()
                counts = reporting.admit(name, reply.counts) if type(reply) is Reported else None
                found |= {name: counts} if counts else {}
        except Exception:  # a reply may be anything, and break in ways of its own
            continue
    return found
