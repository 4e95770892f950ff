"""Build a federation in this process, from a configuration or from a task and shards that are passed from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyrank import devices, methods
from anyrank.config.sections import HANDED_IN, Config
from anyrank.data import partition
from anyrank.data.partition import ByName
from anyrank.engines.inprocess import InProcess
from anyrank.errors import AnyRankError, ConfigError, RunFailed
from anyrank.federation import cohort, loop
from anyrank.federation.checks import check_private, check_ranks, check_rounds
from anyrank.federation.engine import Engine
from anyrank.federation.federation import Federation
from anyrank.federation.standing import MOST_CLIENTS, Labels
from anyrank.methods import Method
from anyrank.privacy.plan import PrivacyPlan, plan_privacy
from anyrank.progress import Progress
from anyrank.robust import central_noise, rules
from anyrank.runs.folder import RunDir
from anyrank.runs.removal import remove_start
from anyrank.simulation.sites import dealt, own_scores
from anyrank.tasks.base import Task, judged
from anyrank.tasks.load import load_task
from anyrank.tasks.place import where_it_is
from anyrank.training import private_examples, probe
from anyrank.training.lora import LoraModel


@dataclass(frozen=True)
class Setting:
    """The inputs of an engine: a task, its `shards` by client, the configuration, the largest rank, and the privacy plan."""

    task: Task
    shards: ByName
    config: Config
    largest_rank: int
    privacy: PrivacyPlan | None


def in_process(setting: Setting) -> InProcess:
    """The engine that runs all clients here, after every check that needs the model. Raises `ModelError`."""
    config = setting.config
    model = LoraModel(setting.task, config.train.gradient_checkpointing)
    stacking = config.run.stacking
    try:
        model.check_rank(setting.largest_rank)
        if config.model.task == HANDED_IN or config.model.file:
            probe.check(model)
            stacking = "never" if stacking == "auto" and not probe.stacks(model, config.train.batch_size) else stacking
        if setting.privacy and setting.privacy.level == "example":
            private_examples.check(model)
    except BaseException:
        model.close()
        raise
    return InProcess(model, setting.shards, config.eval.batch_size, stacking)


def build(
    config: Config,
    progress: Progress | None = None,
    *,
    task: Task | None = None,
    shards: Any = None,
    method: Method | None = None,
    engine: Callable[[Setting], Engine] = in_process,
) -> Federation:
    """The federation of a configuration, ready to run; checks all that can be checked before round 1.

    `task`, `shards` (`shards[i]` `[n]`: the examples of client i) and `method` replace those of the configuration.
    Close the federation when it is no longer needed.
    """
    method = method or _method(config)
    check_ranks(config, method)
    task = judged(where_it_is(task), config.eval) if task else load_task(config, progress)
    if shards is None and config.data.partition.kind == HANDED_IN:
        raise ConfigError("data.partition.kind = 'handed-in': its shards were handed in by a Python program; run that")
    clients = config.clients
    if shards is None:
        shards, clients = dealt(config, task)
    population = cohort.populate(clients, shards.sizes, config.run.seed)
    labels, step_factor = (
        own_scores(config, population, task) or _labels(population, shards, task),
        1,
    )  # of the registered clients, even if one client replaces all of them
    if method.pools_data:
        step_factor, shards = population.cohort_size, partition.pooled(shards)
        population = population.pooled(len(shards[0]))
    privacy = plan_privacy(config, population.sizes)
    check_rounds(config, population, privacy)
    rules.check(config.robust, method, privacy is not None and privacy.central, population.cohort_size)
    if privacy:
        check_private(privacy, method)
        if privacy.central:
            central_noise.check(method, population.levels())
        labels = None  # label shares are private to the clients
    facts = task.facts()
    if privacy:
        facts = replace(facts, train_examples=sum(privacy.declared(int(size)) for size in population.sizes))
    made = engine(Setting(task, ByName(shards, population.index), config, population.levels()[-1], privacy))
    return Federation(config, method, population, made, facts, step_factor, labels, privacy)


def _method(config: Config) -> Method:
    if config.method.file:
        methods.load_file(config.method.file)
    return methods.make(config.method.name, config.method.options)


def _labels(population: cohort.Population, shards: Any, task: Task) -> Labels | None:
    """The label shares of the clients; `None` if labels are not classes, or if there are too many clients."""
    if len(population) > MOST_CLIENTS or not task.has_classes:
        return None
    members = range(len(population))
    names, own = [population.name(i) for i in members], [np.asarray(shards[i]) for i in members]
    return Labels.of(names, own, task.train.labels.cpu().numpy())


def execute(
    config: Config,
    out: Path,
    resume: bool = False,
    on_round: Any = None,
    progress: Progress | None = None,
    **instead: Any,
) -> dict[str, Any]:
    """Build and run a configuration in the folder `out`; returns the summary. Nothing is written before all is checked.

    `instead`: `task`, `shards` and `method`, as for `build`.
    """
    RunDir.check(out, config, resume)
    new = not out.exists()
    with devices.threads(config.run.threads), torch.enable_grad():
        built = build(config, progress, **instead)
        try:
            with RunDir.open(out, config, resume) as store:
                return loop.run(built, store, on_round)
        except RunFailed:
            raise
        except AnyRankError:
            if new:  # wrong before round 1: the request has to be corrected, and there is nothing to resume
                remove_start(out)
            raise
        finally:
            built.close()
