"""Estimate the cost of a run before anyone trains: clients, ranks, parameters, bytes, memory, and time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from anyrank import devices, simulation
from anyrank.config.sections import Config
from anyrank.federation import loop
from anyrank.federation.federation import Federation
from anyrank.federation.quorum import Quorum
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Client, Download, Job, ServerState, factor_bytes, tensor_bytes
from anyrank.methods import Method
from anyrank.privacy.noise import Mechanism
from anyrank.progress import Progress
from anyrank.robust.base import Chain, Rule
from anyrank.robust.central_noise import CentralNoise
from anyrank.robust.norm_bound import FEWEST, NormBound
from anyrank.robust.owners import SingleOwner
from anyrank.robust.rules import bound_of, merges, rule_of
from anyrank.simulation import building
from anyrank.studies import budget, spending


def cost(config: Config, measure: bool = True, progress: Progress | None = None) -> dict[str, Any]:
    """The figures of `config`'s run; no training is kept, and no run folder is made.

    Bytes are those of round 1, from the method's downloads for each rank (with some methods, downloads grow later). Bytes per
    round and in total are expected values over the draw of the cohorts. `measure`: time one local step of each rank, and
    estimate the time of training from it, always in this process. Raises the errors of a run for a wrong request.
    """
    chosen: list[str] = []
    config = building.settled(config, progress, chosen.append)
    with devices.threads(config.run.threads):
        built = simulation.build(config.replace(run={"engine": "process"}), progress)
        try:
            state = loop.start(built)
            levels = [_level(built, state, rank, count) for rank, count in _counts(built.population.ranks)]
            activations = _measure(built, state, levels) if measure else 0
            return _figures(built, state, levels, activations) | {"chosen_ranks": chosen}
        finally:
            built.close()


def _counts(ranks: np.ndarray) -> Iterator[tuple[int, int]]:
    values, counts = np.unique(ranks, return_counts=True)
    return zip(values.tolist(), counts.tolist(), strict=True)


def _level(built: Federation, state: ServerState, rank: int, count: int) -> dict[str, Any]:
    """The row of one rank, which `count` clients have."""
    download = built.method.dispatch(state, Client(f"any of rank {rank}", rank))
    return {
        "rank": rank,
        "clients": count,
        "a_round": count * built.population.cohort_size / len(built.population),
        "trainable_parameters": _trainable(download),
        "upload_bytes": download.upload_bytes(),
        "download_bytes": download.download_bytes(),
        "step_s": None,
    }


def _trainable(download: Download) -> int:
    layers = download.adapter.layers.values()
    factors = sum(getattr(layer, factor).numel() for layer in layers for factor in download.train)
    return factors + sum(tensor.numel() for tensor in download.adapter.tensors.values())


def _measure(built: Federation, state: ServerState, levels: list[dict[str, Any]]) -> int:
    """Write the seconds of one local step of each rank into its level; returns the bytes that steps keep for gradients."""
    jobs = [job for level in levels if (job := _job(built, state, level["rank"]))]
    train = replace(built.config.train, local_steps=1, local_epochs=0)
    mechanism = Mechanism(replace(built.privacy, local_steps=1, bands={})) if built.privacy else None
    profile = built.engine.profile(jobs, plan_round(train, 1, 2, built.config.run.seed), mechanism)
    for job in jobs:
        next(level for level in levels if level["rank"] == job.client.rank)["step_s"] = profile.step_s[job.client.name]
    return profile.activations


def _job(built: Federation, state: ServerState, rank: int) -> Job | None:
    """The work of the first client of a rank that has examples."""
    for index in np.flatnonzero(built.population.ranks == rank):
        if count := built.counted(int(built.population.sizes[int(index)])):
            client = built.population.client(int(index))
            return Job(client, count, partial(built.method.dispatch, state, client))
    return None


def _figures(built: Federation, state: ServerState, levels: list[dict[str, Any]], activations: int) -> dict[str, Any]:
    config, rounds = built.config, built.config.run.rounds
    answering = 1 - config.clients.dropout  # the others get a download and send nothing
    up = answering * sum(level["a_round"] * level["upload_bytes"] for level in levels)
    down = sum(level["a_round"] * level["download_bytes"] for level in levels)
    steps = _steps(built)
    timed = [level for level in levels if level["step_s"] is not None]
    round_s = answering * sum(level["a_round"] * level["step_s"] for level in timed) * steps if timed else None
    return {
        "name": config.run.name,
        "method": config.method.name,
        "task": built.facts.task,
        "rounds": rounds,
        "clients": len(built.population),
        "cohort": built.population.cohort_size,
        "local_steps": steps,
        "levels": levels,
        "upload_bytes_a_round": round(up),
        "download_bytes_a_round": round(down),
        "upload_bytes": round(up * rounds),
        "download_bytes": round(down * rounds),
        "memory_bytes": _memory(built, state, levels) | {"activations": activations},
        "privacy": budget.of_run(built) if built.privacy else None,
        "data_sets": spending.forecast(spending.of_run(built)),
        "guard": _guard(built),
        "round_s": round_s,
        "training_s": round_s * rounds if timed else None,
    }


def _guard(built: Federation) -> dict[str, Any]:
    """The limits on one client that hold in this run, and what a round needs. `norm`, `far`, `owner`, `rule` are `None` where
    there is no such limit; `off`: why there is none, whatever `[guard]` says, or empty.
    """
    config, cohort = built.config, built.population.cohort_size
    mechanism = Mechanism(built.privacy) if built.privacy else None
    bound, rule = (make(config, built.method, mechanism) for make in (bound_of, rule_of))
    limited = isinstance(bound, NormBound)
    rules = rule.rules if isinstance(rule, Chain) else ()
    return {
        "norm": (bound.factor or None) if limited else None,
        "far": (bound.far or None) if limited else None,
        "owner": next((each.most for each in rules if isinstance(each, SingleOwner)), None),
        "rule": config.robust.rule if config.robust.rule != "none" else None,
        "off": _off(bound, rule, config, cohort, built.method),
        "rollback": config.guard.rollback,
        "offences": config.guard.offences,
        "rest": config.guard.rest,
        "uploads": max(Quorum(config.rounds.least, config.rounds.share).needed(cohort), rule.least),
        "deadline_s": config.rounds.deadline_s or None,
        "dropout": config.clients.dropout,
    }


def _off(bound: Rule, rule: Rule, config: Config, cohort: int, method: Method) -> str:
    """Why no step is limited, although `[guard]` asks for it."""
    if isinstance(rule, CentralNoise):
        return "the noise at the server is computed for public weights"
    if not merges(method) and (config.guard.norm or config.guard.far or config.guard.owner < 1):
        return f"{config.method.name} makes no mean of uploads"
    few = isinstance(bound, NormBound) and cohort < FEWEST
    return f"fewer than {FEWEST} clients a round, of which there is no median" if few else ""


def _steps(built: Federation) -> float:
    """Local steps of a client in a round, the mean over clients."""
    train = built.config.train
    per_epoch = float(np.mean(np.ceil(built.population.sizes / train.batch_size)))
    return (train.local_steps or train.local_epochs * per_epoch) * built.step_factor


def _memory(built: Federation, state: ServerState, levels: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes that a run in one process holds, by purpose, without the interpreter; the base model, the examples of a
    batch and what local steps keep for their gradients (activations) are on `model.device`.

    `examples_on_disk` are in a file, of which the operating system caches what fits in memory.
    """
    population, facts = built.population, built.facts
    cohort = sum(level["a_round"] * (level["upload_bytes"] + level["download_bytes"]) for level in levels)
    kept = 0.0
    if built.method.private:  # the server stores each client's private part from the client's first round on
        taking_part = min(len(population), population.cohort_size * built.config.run.rounds) / len(population)
        for level in levels:
            adapter = built.method.dispatch(state, Client("anyone", level["rank"])).adapter
            kept += taking_part * level["clients"] * _adapter_bytes(adapter)
    return {
        "base_model": facts.model_bytes,
        "examples": 0 if facts.inputs_on_disk else facts.inputs_bytes,
        "examples_on_disk": facts.inputs_bytes if facts.inputs_on_disk else 0,
        "clients": int(population.ranks.nbytes + population.sizes.nbytes),
        "server_state": _adapter_bytes(state.adapter),
        "cohort": round(cohort),
        "kept_for_clients": round(kept),
    }


def _adapter_bytes(adapter) -> int:
    return factor_bytes(adapter, frozenset("AB")) + tensor_bytes(adapter)
