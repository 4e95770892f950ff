"""From a configuration to a federation in this process: task, partition, population, method, engine."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from anyrank import cohort, federation, hardware, methods, partition, private_mean, private_training
from anyrank.config import OWN_HEADS, Config, DataConfig, LoraConfig, ModelConfig
from anyrank.engines.inprocess import InProcess
from anyrank.errors import ConfigError
from anyrank.federation import Federation
from anyrank.methods.registry import REGISTRY, taking_mixed_ranks
from anyrank.models import LoraModel
from anyrank.privacy.plan import PrivacyPlan, plan_privacy
from anyrank.rundir import RunDir
from anyrank.standing import MOST_CLIENTS, Labels
from anyrank.tasks.base import Task

Progress = Callable[[int, int], None]

# The room of each `model.task`: a module of `anyrank.tasks` with `load(model, data, lora, cache, progress) -> Task`.
_TASKS = {"image-classification": "vision", "text-classification": "text", "causal-lm": "causal"}


def cache_dir() -> Path:
    """Where frozen features and pretrained demo models are kept between runs: `$ANYRANK_CACHE`, or the user's cache."""
    chosen = os.environ.get("ANYRANK_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "anyrank"


def load_task(config: Config, progress: Progress | None = None) -> Task:
    """The task that a configuration describes; the last one is kept, so that a grid of runs loads it once."""
    task = _load_task(config.model, config.data, config.lora, progress)
    return replace(task, objective=task.objective.under(config.eval))


@functools.lru_cache(maxsize=1)
def _cached_task(model: ModelConfig, data: DataConfig, lora: LoraConfig) -> list:
    return []


def _load_task(model: ModelConfig, data: DataConfig, lora: LoraConfig, progress: Progress | None) -> Task:
    slot = _cached_task(model, data, lora)  # a list, so that `progress` is no part of the key
    if not slot:
        room = importlib.import_module(f"anyrank.tasks.{_room(model, data)}")  # a task's own imports may be heavy
        slot.append(hardware.place(room.load(model, data, lora, cache_dir(), progress), model))
    return slot[0]


def _room(model: ModelConfig, data: DataConfig) -> str:
    """The module of `anyrank.tasks` that a configuration's task is made by."""
    if model.task == "image-classification" and data.source == "digits":
        return "digits"
    return "text_classifier" if model.head in OWN_HEADS else _TASKS[model.task]


def build(config: Config, progress: Progress | None = None) -> Federation:
    """The federation of a configuration, ready to run in this process; checks all that can be checked before round 1."""
    torch.set_num_threads(config.run.threads)
    if config.method.file:
        methods.load_file(config.method.file)
    method = methods.make(config.method.name, config.method.options)
    _check_ranks(config, method)
    task = load_task(config, progress)
    torch.set_num_threads(config.run.threads)
    examples, clients = task.train.labels.cpu(), config.clients.count
    shards = partition.partition(config.data.partition, examples, clients, config.run.seed, task.columns)
    population = cohort.populate(config.clients, shards, config.run.seed)
    labels, step_factor = _labels(population, task), 1  # of the clients there are, also where one stands in for all
    if method.pools_data:
        population, step_factor = population.pooled(), population.cohort_size
    model = LoraModel(task, config.train.gradient_checkpointing)
    model.check_rank(population.levels()[-1])
    private = plan_privacy(config, population.shards.sizes)
    if private:
        _check_private(private, method)
        if private.central:
            private_mean.check(method, population.levels())
        if private.level == "example":
            private_training.check(model)
        labels = None  # what kinds of examples clients have is theirs to know
    engine = InProcess(model, population.shards, config.eval.batch_size, config.run.stacking)
    facts = {
        "task": task.name,
        "head": task.head,
        "base_model": task.base_model,
        "train_examples": sum(private.declared(int(n)) for n in population.shards.sizes) if private else len(task.train),
        "test_examples": len(task.test),
        "inputs_bytes": task.train.inputs.nbytes + task.test.inputs.nbytes,
        "inputs_in": config.model.features if config.model.task == "text-classification" else "memory",
    }
    return Federation(config, method, population, engine, facts, step_factor, labels, private)


def _labels(population: cohort.Population, task: Task) -> Labels | None:
    """What kinds of examples the clients have; `None` where there are too many clients to tell them apart."""
    if len(population) > MOST_CLIENTS:
        return None
    members = range(len(population))
    names, shards = [population.name(i) for i in members], [population.shards[i] for i in members]
    return Labels.of(names, shards, task.train.labels.cpu().numpy())


def execute(config: Config, out: Path, resume: bool = False, on_round=None, progress: Progress | None = None) -> dict:
    """Build and run a configuration in the folder `out`; returns the summary. Nothing is written before all is checked."""
    RunDir.check(out, config, resume)
    built = build(config, progress)
    try:
        with RunDir.open(out, config, resume) as store:
            return federation.run(built, store, on_round)
    finally:
        built.engine.model.close()


def _check_ranks(config: Config, method: methods.Method) -> None:
    ranks = sorted(set(config.clients.ranks))
    if len(ranks) > 1 and not method.traits.mixed_ranks and not method.pools_data:
        raise ConfigError(
            f"method.name: {method.name} needs clients of one rank, clients.ranks has {', '.join(map(str, ranks))}; "
            f"set one rank, or use a method that takes mixed ranks: {taking_mixed_ranks()}"
        )


def _check_private(plan: PrivacyPlan, method: methods.Method) -> None:
    """Raise `ConfigError` for a method whose clients' training the plan does not cover."""
    if plan.level == "client" and not plan.central and len(method.train) != 1:
        both = ", ".join(sorted(name for name, kind in REGISTRY.items() if len(kind.train) == 1 and not kind.reference))
        raise ConfigError(
            f"method.name: {method.name} trains A and B together, whose noise would multiply in the product; privacy.level = "
            f"'client' is for methods that train one factor a round: {both}"
        )
    if method.pools_data:
        raise ConfigError(
            f"method.name: {method.name} gathers all examples in one place, where no client could promise anything for its "
            "own; choose a method that federates"
        )
    if method.private:
        raise ConfigError(
            f"method.name: with {method.name}, {' and '.join(sorted(method.private))} stay with each client and are scored one "
            "by one; private training covers methods whose clients keep nothing: choose another"
        )
    if getattr(method, "prune", False):
        raise ConfigError(
            f"method.prune: {method.name} would prune ranks by norms that are mostly noise; set method.prune=false, or choose "
            "another method"
        )
