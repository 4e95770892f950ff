"""A federation whose clients train in worker processes on this machine, and how many of them fit on it."""

from __future__ import annotations

import os
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
from anyrank.worker import memory

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def build(config: Config, method: Method, progress: Progress | None = None) -> Federation:
    """The federation over `run.workers` workers; the first one loads the task before this returns."""
    if config.model.task == HANDED_IN or config.data.partition.kind == HANDED_IN or config.method.handed_in:
        raise ConfigError(
            "run.engine = 'workers': this task was handed in by a Python program, and other processes do not have it; use "
            "run.engine = 'process', or register it in a file (model.file)"
        )
    gpus, most = _gpus(config), round(config.run.worker_memory_gb * 1e9)
    largest = max(config.clients.ranks[: config.clients.count])
    limits = {"most_memory": most, "refuse": not gpus}  # a GPU's driver reserves memory that it does not take
    engine = Workers(to_table(config), largest, progress, config.rounds.deadline_s or None, **limits)
    try:
        engine.add(on_gpu(gpus, 0))
        ready = engine.ready
        settled = assembly.assemble(config, method, ready.roster)
        wanted = config.run.workers or fitting(
            1 if _together(config) and ready.together else settled.population.cohort_size,
            cores=devices.cores() // config.run.threads,
            taken=most or ready.memory,
            available=memory.available(),
            gpus=len(gpus),
        )
        for place in range(1, wanted):
            engine.add(on_gpu(gpus, place))
    except BaseException:
        engine.close()
        raise
    return replace(settled, engine=engine)


def keep_replies(federation: Federation, folder: Path) -> None:
    """Let large replies of workers lie in a file in the run's folder until they are merged."""
    if isinstance(federation.engine, Workers):
        federation.engine.keep_in(folder)


def fitting(works: int, cores: int, taken: int, available: int | None, gpus: int = 0) -> int:
    """How many workers fit: at least 1, and not more than `works`, which can be done at the same time.

    `cores`: how many have a core each; `taken`: bytes of memory that each takes, as the first one did, beside which `available`
    bytes are left (`None`: not known). With GPUs, one for each, however few the cores.

    >>> fitting(works=20, cores=8, taken=3 * 10**9, available=10 * 10**9)
    4
    >>> fitting(works=20, cores=8, taken=3 * 10**9, available=10 * 10**9, gpus=2)
    2
    """
    places = [works, gpus or cores]
    if available is not None and taken > 0:
        places.append(1 + available // taken)
    return max(1, min(places))


def on_gpu(gpus: tuple[str, ...], place: int) -> Mapping[str, str]:
    """The changes to the environment of the worker at `place`: which one of `gpus` it sees.

    >>> on_gpu(("0", "1"), 2), on_gpu((), 2)
    ({'CUDA_VISIBLE_DEVICES': '0'}, {})
    """
    return {_VISIBLE: gpus[place % len(gpus)]} if gpus else {}


def visible(chosen: str | None, count: int) -> tuple[str, ...]:
    """The GPUs that this process sees, by CUDA's names for them. `chosen`: the value of `CUDA_VISIBLE_DEVICES`, numbers or
    UUIDs, of which `count` were found.

    >>> visible(None, 2), visible("3,GPU-8f2e", 2), visible("1,-1,0", 1), visible("", 0)
    (('0', '1'), ('3', 'GPU-8f2e'), ('1',), ())
    """
    names = [str(place) for place in range(count)] if chosen is None else [name.strip() for name in chosen.split(",")]
    return tuple(names[:count])  # CUDA sees those before the first name that is none


def _gpus(config: Config) -> tuple[str, ...]:
    """The GPUs that clients may train on."""
    if config.model.device not in ("cuda", "auto"):
        return ()
    import torch

    return visible(os.environ.get(_VISIBLE), torch.cuda.device_count())


def _together(config: Config) -> bool:
    """Whether clients may train together, as far as the configuration says it."""
    return config.privacy.level == "none" and config.train.accumulation_steps == 1
