"""The round loop: cohort, dispatch, local training, guard, aggregate, evaluate, run folder. It knows no method and no task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from anyrank import collapse, guard, local, private_mean
from anyrank.cohort import Population
from anyrank.config import Config, to_table
from anyrank.engines.base import Engine, Job
from anyrank.errors import RunFailed
from anyrank.methods import Method
from anyrank.privacy.ledger import SPENT, Ledger, Unlimited, open_ledger
from anyrank.privacy.plan import PrivacyPlan
from anyrank.records import Client, ClientUpdate, Failure, Scaling, ServerState
from anyrank.rundir import RunDir
from anyrank.standing import UNSCORED, Labels, Standing, of_global, of_personal
from anyrank.summary import summarize


@dataclass(frozen=True, eq=False)
class Federation:
    """Everything a run consists of. `step_factor` multiplies the local steps of the round plan (1 but for `centralized`);
    `labels`: what kinds of examples each client has, where clients are told apart; `privacy`: what is promised of what they
    send."""

    config: Config
    method: Method
    population: Population
    engine: Engine
    facts: Mapping[str, Any] = field(default_factory=dict)
    step_factor: int = 1
    labels: Labels | None = None
    privacy: PrivacyPlan | None = None

    def counted(self, num_examples: int) -> int:
        """The examples that a client counts as: its own number, or what a privacy plan declares in its stead."""
        return self.privacy.declared(num_examples) if self.privacy else num_examples

    @property
    def upload_bound(self) -> float:
        """The norm that an upload's change may have."""
        return self.privacy.upload_bound if self.privacy else math.inf


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


def run(federation: Federation, store: RunDir, on_round: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run, or go on with, the federation in `store`; returns the summary. `on_round` gets each round's metrics.

    Raises `RunFailed` when every client of a round fails; the last checkpoint stands.
    """
    config, method, engine = federation.config, federation.method, federation.engine
    first = start(federation)
    state, end = store.restore() or first, None
    ledger = open_ledger(federation.privacy, to_table(config), store)
    while state.round < config.run.rounds:
        began, round = time.perf_counter(), state.round + 1
        jobs, skipped = charge(ledger, *dispatch(federation, state, round), round)
        privacy = ledger.mechanism()
        plan = local.plan_round(config.train, round, config.run.rounds, config.run.seed, federation.step_factor, privacy)
        collected = collect(engine.train(jobs, plan), jobs, skipped, round, federation.upload_bound)
        state = private_mean.aggregate(method, state, jobs, collected.updates, privacy)
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


def measure(
    federation: Federation, state: ServerState, jobs: Sequence[Job], collected: Collected, standing: Standing | None
) -> dict[str, Any]:
    """The round's metrics; accuracy and loss are `None` in rounds that are not scored, spectra where there is no one model."""
    served = federation.method.served(state)
    figures = standing.figures() if standing else UNSCORED
    spectra = collapse.spectra(served["global"], state.merged) if "global" in served else None
    uploads = {update.client: update.adapter for update in collected.updates}
    losses = [update.metrics["loss"] for update in collected.updates if "loss" in update.metrics]
    smallest = federation.population.levels()[0]
    return {
        "round": state.round,
        **figures,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "collapse": collapse.energy_beyond(spectra, smallest) if spectra else None,
        "effective_rank": collapse.effective_rank(spectra) if spectra else None,
        "spectrum": {name: [float(f"{v:.6g}") for v in each.tolist()] for name, each in spectra.items()} if spectra else None,
        "upload_bytes": sum(job.download.upload_bytes(uploads[name]) for job in jobs if (name := job.client.name) in uploads),
        "download_bytes": sum(job.download.download_bytes() for job in jobs),
        "clients": len(collected.updates),
        "rejected": collected.count("rejected", "failed"),
    }


def score(federation: Federation, state: ServerState) -> Standing:
    """How good what the federation's users run is: the global model, or the personal ones."""
    served = federation.method.served(state)
    scores = {name: federation.engine.evaluate(adapter, state.merged) for name, adapter in sorted(served.items())}
    if len(scores) == 1 and not scores.keys() & set(federation.labels.names if federation.labels else ()):
        return of_global(next(iter(scores.values())), federation.labels)
    return of_personal(scores, federation.labels)


def shares(federation: Federation, state: ServerState) -> dict[str, Any]:
    """The adapters that a finished run leaves: the global one, what a client of each rank gets, what is in the base model."""
    ranks = {f"adapter-rank-{rank}": rank for rank in federation.population.levels()}
    by_rank = {folder: federation.method.share(state, Client(folder, rank)) for folder, rank in ranks.items()}
    into_base = {"base-update": state.merged} if state.merged else {}
    return {"adapter": state.adapter, **by_rank, **into_base}
