"""The round loop: dispatch, train, collect, screen, aggregate, score, commit. It knows no method, engine or task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from anyrank.config.tables import identity
from anyrank.federation.advance import advance
from anyrank.federation.federation import Federation
from anyrank.federation.figures import measure, score, shares
from anyrank.federation.intake import Skipped, charge, collect
from anyrank.federation.quarantine import Quarantine
from anyrank.federation.quorum import Patience
from anyrank.federation.summary import summarize
from anyrank.messages.records import Job, Scaling, ServerState
from anyrank.privacy.ledger import open_ledger
from anyrank.robust.rules import rule_of
from anyrank.runs.folder import RunDir


def run(federation: Federation, store: RunDir, on_round: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run or resume the federation in `store`; returns the summary. `on_round` gets each round's metrics.

    Raises `RunFailed` after `rounds.patience` idle rounds in a row; the last checkpoint stands.
    """
    config, method = federation.config, federation.method
    first = start(federation)
    state, before, end = store.restore() or first, score(federation, first), None
    ledger = open_ledger(federation.privacy, identity(config), store, state.round, federation.drawn)
    patience = Patience.of(config.rounds, config.run.rounds, store.metrics())
    quarantine = Quarantine(config.guard.offences, config.guard.rest, store.clients())
    while state.round < config.run.rounds:
        began, round = time.perf_counter(), state.round + 1
        mechanism = ledger.mechanism()
        rule, plan = rule_of(config, method, mechanism), federation.plan(round)
        jobs, skipped = charge(ledger, *dispatch(federation, state, round), round)
        asked, resting = present(quarantine, jobs, round)
        awake = [job for job in asked if not federation.drops_out(job.client.name, round)]
        replies = federation.engine.train(awake, plan, mechanism, config.rounds.deadline_s or None)
        collected = collect(replies, asked, [*skipped, *resting], round, federation.upload_bound)
        advanced = advance(federation, rule, state, jobs, len(asked), collected)
        state, end = advanced.state, advanced.standing
        metrics = measure(federation, state, collected, end, advanced.idle) | ledger.figures(round)
        metrics["seconds"] = time.perf_counter() - began
        store.commit(state, metrics, collected.rows)
        quarantine.note(collected.rows)
        if on_round:
            on_round(metrics)
        patience = patience.after(round, advanced.idle)
    end = end or score(federation, state)  # for a run that was interrupted between its last round and its end
    summary = summarize(federation, before, end, store.metrics()) | ledger.summary(state.round)
    store.finish(shares(federation, state), summary)
    ledger.close()
    return summary


def start(federation: Federation) -> ServerState:
    """The state before round 1."""
    config, ranks = federation.config, federation.population.levels()
    scaling = Scaling(config.lora.alpha, config.lora.scaling)
    adapter = federation.engine.start(ranks[-1], scaling, config.run.seed)
    return federation.method.init(adapter, scaling, config.run.seed)


def dispatch(federation: Federation, state: ServerState, round: int) -> tuple[list[Job], list[Skipped]]:
    """The jobs of the round's cohort, and the clients that have no examples to train on."""
    jobs, idle, population = [], [], federation.population
    for index in population.draw(round):
        client, count = population.client(index), federation.counted(int(population.sizes[index]))
        if count:
            jobs.append(Job(client, count, partial(federation.method.dispatch, state, client)))
        else:
            idle.append(Skipped(client, 0, "has no examples"))
    return jobs, idle


def present(quarantine: Quarantine, jobs: Sequence[Job], round: int) -> tuple[list[Job], list[Skipped]]:
    """The jobs of the clients that are asked in the round, and those that rest."""
    asked, resting = [], []
    for job in jobs:
        if reason := quarantine.reason(job.client.name, round):
            resting.append(Skipped(job.client, job.num_examples, reason))
        else:
            asked.append(job)
    return asked, resting
