"""A federation whose clients train in worker processes on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from anyrank import devices
from anyrank.config.sections import HANDED_IN, Config
from anyrank.config.tables import to_table
from anyrank.engines.workers import Workers
from anyrank.errors import ConfigError
from anyrank.federation import assembly
from anyrank.federation.federation import Federation
from anyrank.methods import Method
from anyrank.progress import Progress


def build(config: Config, method: Method, progress: Progress | None = None) -> Federation:
    """The federation over `run.workers` workers; the first one loads the task before this returns."""
    if config.model.task == HANDED_IN or config.data.partition.kind == HANDED_IN or config.method.handed_in:
        raise ConfigError(
            "run.engine = 'workers': this task was handed in by a Python program, and other processes do not have it; use "
            "run.engine = 'process', or register it in a file (model.file)"
        )
    engine = Workers(to_table(config), max(config.clients.ranks[: config.clients.count]), progress)
    try:
        settled = assembly.assemble(config, method, engine.ready.roster)
        for env in envs(config, settled.population.cohort_size, engine.ready.memory)[1:]:
            engine.add(env)
    except BaseException:
        engine.close()
        raise
    return replace(settled, engine=engine)


def keep_replies(federation: Federation, folder: Path) -> None:
    """Let large replies of workers lie in a file in the run's folder until they are merged."""
    if isinstance(federation.engine, Workers):
        federation.engine.keep_in(folder)


def envs(config: Config, cohort: int, memory: int) -> list[Mapping[str, str]]:
    """The workers, as changes to their environments. `memory`: bytes that one of them has taken."""
    wanted = config.run.workers or max(1, min(cohort, devices.cores() // config.run.threads))
    return [{} for _ in range(wanted)]
