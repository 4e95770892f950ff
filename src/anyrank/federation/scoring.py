"""When models are scored, and by whom: by the server's engine after a round, or by the clients before they train.

If clients score (`eval.where = "sites"`), a round's figures are those of the state that it started from, as the clients report
them that answered. The last state is scored in one exchange after the last round, in which nobody trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
from anyrank.runs import waiting

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


def final(federation: Federation, state: ServerState, last: Standing | None, quarantine: Quarantine, folder: Path) -> Final:
    """The standing of the last `state`; `last`: it, if the last round has scored it already. `folder`: that of the run, which
    says meanwhile who has not replied."""
    reporting, entries = federation.reporting, {"unscored": federation.unscored} if federation.unscored else {}
    if not (reporting or federation.hands_over):
        return Final(_NONE if federation.unscored else last or score(federation, state), entries)
    jobs = _jobs(federation, state, quarantine)
    plan = replace(federation.plan(state.round), round=state.round + 1)
    with waiting.shown(folder, plan.round, [job.client.name for job in jobs]) as wait:
        replies = federation.engine.score(jobs, plan, federation.config.rounds.deadline_s or None)
        answered = _collected(wait.heard(replies), jobs, reporting)
    if reporting:
        asked = sum(_has_examples(federation, job.client.name) for job in jobs)
        entries |= {"scored_by": sum(map(bool, answered.values())), "scored_of": asked}
    if federation.hands_over:
        entries |= {"handed_over": sorted(answered)}
    entries |= {"scoring_bytes": sum(map(_downloaded, jobs))}
    found = {name: counts for name, counts in answered.items() if counts}
    return Final(reporting.standing(found) if reporting else _NONE, entries)


def _downloaded(job: Job) -> int:
    """Bytes of a job's download, which is not kept: memory holds one at a time."""
    size = job.download.download_bytes()
    job.settle()
    return size


def _jobs(federation: Federation, state: ServerState, quarantine: Quarantine) -> list[Job]:
    """What each client would download next that has held-out examples, or keeps what it is sent; but for those that rest."""
    population, jobs = federation.population, []
    for index in range(len(population)):
        client, count = population.client(index), federation.counted(int(population.sizes[index]))
        wanted = federation.hands_over or _has_examples(federation, client.name)
        if wanted and not quarantine.reason(client.name, state.round + 1):
            jobs.append(Job(client, count, partial(federation.method.dispatch, state, client)))
    return jobs


def _has_examples(federation: Federation, client: str) -> bool:
    """Whether a client scores what it downloads on held-out examples of its own."""
    return federation.reporting is not None and federation.reporting.most(client) > 0


def _collected(replies: Iterable[Any], jobs: Sequence[Job], reporting: Reporting | None) -> dict[str, Counts | None]:
    """`{client: counts}` of the first reply of each client, `None` where it sends none; of one that failed, or cannot be
    believed, nothing."""
    awaited, found = {job.client.name: job for job in jobs}, {}
    for reply in replies:
        try:
            name = reply.client
            if type(name) is str and name in awaited:
                awaited.pop(name).settle()
                if type(reply) is Reported:
                    found[name] = reporting.admit(name, reply.counts) if reporting else None
        except Exception:  # a reply may be anything, and break in ways of its own
            continue
    return found
