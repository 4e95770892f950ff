"""The round loop: dispatch, train, collect, screen, aggregate, score, commit. It knows no method, engine or task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from anyrank.config.tables import identity
from anyrank.federation import accounts, late, scoring
from anyrank.federation.advance import advance
from anyrank.federation.asking import ask
from anyrank.federation.federation import Federation
from anyrank.federation.figures import measure, shares
from anyrank.federation.intake import collect
from anyrank.federation.quarantine import Quarantine
from anyrank.federation.quorum import Patience
from anyrank.federation.summary import summarize
from anyrank.messages.records import Scaling, ServerState
from anyrank.privacy.ledger import open_ledger
from anyrank.robust.rules import bound_of, rule_of
from anyrank.runs import waiting
from anyrank.runs.folder import RunDir


def run(federation: Federation, store: RunDir, on_round: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run or resume the federation in `store`; returns the summary. `on_round` gets each round's metrics.

    Raises `RunFailed` after `rounds.patience` idle rounds in a row; the last checkpoint stands.
    """
    config, method = federation.config, federation.method
    first = start(federation)
    (state, held), before, end = late.split(store.restore() or first), scoring.before(federation, first), None
    ledger = open_ledger(federation.privacy, identity(config), store, state.round, federation.drawn)
    accounts.join(federation, ledger, store.path)
    patience = Patience.of(config.rounds, config.run.rounds, store.metrics())
    quarantine = Quarantine(config.guard.offences, config.guard.rest, store.clients())
    while state.round < config.run.rounds:
        began, round = time.perf_counter(), state.round + 1
        mechanism = ledger.mechanism(round)
        bound, rule = (make(config, method, mechanism) for make in (bound_of, rule_of))
        work, plan = ask(federation, ledger, quarantine, state), federation.plan(round)
        with waiting.shown(store.path, round, [job.client.name for job in work.answering]) as wait:
            replies = wait.heard(scoring.replies(federation, work.answering, plan, mechanism))
            collected = collect(replies, work.asked, work.skipped, round, federation.upload_bound, federation.reporting)
        collected.limit(bound, state, work.jobs)
        jobs, held = late.exchange(federation, state, work, held, collected)
        advanced = advance(federation, rule, state, work, jobs, collected)
        state, end = advanced.state, advanced.standing
        metrics = measure(federation, state, collected, end, advanced.idle)
        metrics |= scoring.reported(federation, work.asked, collected) | ledger.figures(round)
        metrics["seconds"] = None if federation.privacy else time.perf_counter() - began  # how many examples were drawn
        store.commit(late.joined(state, held), metrics, collected.rows)
        quarantine.note(collected.rows)
        if on_round:
            on_round(metrics)
        patience = patience.after(round, advanced.idle)
    patience.check(state.round, str(store.metrics()[-1].get("idle", "")))  # for a run that failed in its last round
    # `end` is missing if the run was interrupted just here
    last = scoring.final(federation, state, end, quarantine, store.path)
    summary = summarize(federation, before, last.standing, store.metrics()) | last.entries | ledger.summary(state.round)
    store.finish(shares(federation, state), summary)
    ledger.close()
    return summary


def start(federation: Federation) -> ServerState:
    """The state before round 1."""
    config, ranks = federation.config, federation.population.levels()
    scaling = Scaling(config.lora.alpha, config.lora.scaling)
    adapter = federation.engine.start(ranks[-1], scaling, config.run.seed)
    return federation.method.init(adapter, scaling, config.run.seed)
