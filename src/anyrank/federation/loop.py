"""The round loop: cohort, dispatch, local training, guard, aggregate, evaluate, run folder. It knows no method and no task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from anyrank.config.tables import identity
from anyrank.federation.federation import Federation
from anyrank.federation.figures import measure, score, shares
from anyrank.federation.intake import Skipped, charge, collect
from anyrank.federation.summary import summarize
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Job, Scaling, ServerState
from anyrank.privacy.ledger import open_ledger
from anyrank.robust import central_noise
from anyrank.runs.folder import RunDir


def run(federation: Federation, store: RunDir, on_round: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run, or go on with, the federation in `store`; returns the summary. `on_round` gets each round's metrics.

    Raises `RunFailed` when every client of a round fails; the last checkpoint stands.
    """
    config, method, engine = federation.config, federation.method, federation.engine
    first = start(federation)
    state, end = store.restore() or first, None
    ledger = open_ledger(federation.privacy, identity(config), store)
    while state.round < config.run.rounds:
        began, round = time.perf_counter(), state.round + 1
        jobs, skipped = charge(ledger, *dispatch(federation, state, round), round)
        privacy = ledger.mechanism()
        plan = plan_round(config.train, round, config.run.rounds, config.run.seed, federation.step_factor, privacy)
        collected = collect(engine.train(jobs, plan), jobs, skipped, round, federation.upload_bound)
        state = central_noise.aggregate(method, state, jobs, collected.updates, privacy)
        end = score(federation, state) if round % config.eval.every == 0 or round == config.run.rounds else None
        metrics = measure(federation, state, jobs, collected, end) | ledger.figures(round)
        metrics["seconds"] = time.perf_counter() - began
        store.commit(state, metrics, collected.rows)
        if on_round:
            on_round(metrics)
    end = end or score(federation, state)  # of a run that had stopped between its last round and its end
    summary = summarize(federation, score(federation, first), end, store.metrics())
    summary |= ledger.summary(state.round)
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
    """The jobs of the round's cohort, and its clients that have no examples to train on."""
    jobs, idle = [], []
    for index in federation.population.draw(round):
        client, count = federation.population.client(index), federation.counted(len(federation.population.shards[index]))
        if count:
            jobs.append(Job(index, client, count, federation.method.dispatch(state, client)))
        else:
            idle.append(Skipped(client, 0, "has no examples"))
    return jobs, idle
