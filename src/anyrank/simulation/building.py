"""Build a federation in this process, from a configuration or from a task and shards that are passed from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyrank import devices, methods
from anyrank.config.sections import HANDED_IN, Config
from anyrank.data import partition
from anyrank.data.partition import ByName
from anyrank.engines.inprocess import InProcess
from anyrank.errors import ConfigError
from anyrank.federation import accounts, assembly, loop
from anyrank.federation.checks import check_ranks, check_secure_sum
from anyrank.federation.engine import Engine
from anyrank.federation.federation import Federation
from anyrank.messages.records import BOTH
from anyrank.methods import Method
from anyrank.privacy.plan import PrivacyPlan
from anyrank.progress import Progress
from anyrank.runs import removal
from anyrank.runs.folder import RunDir
from anyrank.runs.matching import with_stored_ranks
from anyrank.runs.names import CONFIG
from anyrank.simulation import ranks, sources, workers
from anyrank.simulation.sources import Division
from anyrank.tasks import digest
from anyrank.tasks.base import Task, judged
from anyrank.tasks.dealing import dealt, held_out, roster
from anyrank.tasks.load import load_task
from anyrank.tasks.place import where_it_is
from anyrank.training.opening import open_model
from anyrank.training.scoring import Scorer


@dataclass(frozen=True)
class Setting:
    """The inputs of an engine: a task, its `shards` by client, the configuration, the largest rank, and the privacy plan;
    `held_out`: each client's own held-out examples, by name; `train`: the factors that the method trains."""

    task: Task
    shards: ByName
    config: Config
    largest_rank: int
    privacy: PrivacyPlan | None
    held_out: Mapping[str, np.ndarray] = field(default_factory=dict)
    train: frozenset[str] = BOTH


def in_process(setting: Setting) -> InProcess:
    """The engine that runs all clients here, after every check that needs the model. Raises `ModelError`."""
    model, stacking = open_model(setting.task, setting.config, setting.largest_rank, setting.train)
    scoring = setting.config.eval
    scorer = Scorer(model, setting.held_out, scoring.batch_size, scoring.by_label) if scoring.where == "sites" else None
    return InProcess(model, setting.shards, scoring.batch_size, stacking, scorer)


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
    if config.undecided:
        raise ConfigError(
            f"sites.{config.undecided[0].name}.rank: 'auto' is measured by anyrank run and anyrank plan; elsewhere, give the "
            "number that they report"
        )
    method = method or _method(config)
    check_ranks(config, method)
    check_secure_sum(config, method)
    sources.check_held_out(config)
    if config.run.engine == "workers" and engine is in_process:
        built = workers.build(config, method, progress)
        division = Division.of(built.population, built.engine.held[digest.SPLIT]) if built.privacy else None
        return replace(built, sources=sources.sources(config, None, division))
    task = judged(where_it_is(task), config.eval) if task else load_task(config, progress)
    if shards is None and config.data.partition.kind == HANDED_IN:
        raise ConfigError("data.partition.kind = 'handed-in': its shards were handed in by a Python program; run that")
    named: tuple[str, ...] = ()
    if shards is None:
        shards, named = dealt(config, task)
    known = roster(config, task, shards, named, method.pools_data)
    split = digest.split(shards) if config.privacy.level != "none" else ""
    if method.pools_data:
        shards = partition.pooled(shards)
    settle = assembly.assemble(config, method, known)
    place = settle.population.index
    own = held_out(known.names, known.owners)
    setting = Setting(
        task, ByName(shards, place), config, settle.population.levels()[-1], settle.privacy, own, settle.method.train
    )
    division = Division.of(settle.population, split) if settle.privacy else None
    return replace(settle, engine=engine(setting), sources=sources.sources(config, task, division))


def settled(config: Config, progress: Progress | None = None, tell: Callable[[str], None] | None = None) -> Config:
    """`config` with numbers for ranks that are `auto`, by the memory of the sites. Raises `ConfigError` for ranks that do not
    fit in `sites.memory_gb`. `tell` gets a line for each chosen rank. Nothing is measured where nobody asks for it."""
    if not ranks.asked(config):
        return config
    low = ranks.lowest(config).replace(run={"engine": "process"})
    with devices.threads(config.run.threads), torch.enable_grad():
        measured = build(low, progress)
        try:
            return ranks.settle(measured, measured.engine.model, config, tell)
        finally:
            measured.close()


def _method(config: Config) -> Method:
    if config.method.file:
        methods.load_file(config.method.file)
    return methods.make(config.method.name, config.method.options)


def execute(
    config: Config,
    out: Path,
    resume: bool = False,
    on_round: Any = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    **instead: Any,
) -> dict[str, Any]:
    """Build and run a configuration in the folder `out`; returns the summary. Nothing is written before all is checked.

    `tell`: as for `settled`, which decides on ranks that are `auto` before a run begins, and for what a person should know of
    the ledgers of a private run's data; `instead`: `task`, `shards` and
    `method`, as for `build`.
    """
    config = with_stored_ranks(out, config)
    RunDir.check(out, config, resume)
    if not os.path.lexists(out / CONFIG):
        config = settled(config, progress, tell)
    with removal.unless_begun(out), devices.threads(config.run.threads), torch.enable_grad():
        built = build(config, progress, **instead)
        try:
            accounts.check(built, out)
            for line in accounts.notices(built) if tell else ():
                tell(line)
            held = built.engine.held if config.privacy.level != "none" else None
            with RunDir.open(out, config, resume, held=held) as store:
                workers.keep_replies(built, out)
                return loop.run(built, store, on_round)
        finally:
            built.close()
