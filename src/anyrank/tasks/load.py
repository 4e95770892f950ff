"""Load the task of a configuration."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

from anyrank.config.sections import HANDED_IN, Config, DataConfig, LoraConfig, ModelConfig, SiteConfig
from anyrank.errors import AnyRankError, ConfigError, ModelError, in_a_line
from anyrank.progress import Progress
from anyrank.tasks import registry
from anyrank.tasks.base import Task, judged
from anyrank.tasks.place import place

Sites = tuple[SiteConfig, ...]


def cache_dir() -> Path:
    """The folder that keeps frozen features and pretrained demo models between runs: `$ANYRANK_CACHE`, or the user's cache."""
    chosen = os.environ.get("ANYRANK_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "anyrank"


def load_task(config: Config, progress: Progress | None = None) -> Task:
    """The task that a configuration describes; the last one is kept, so that a grid of runs loads it once.

    Raises `ConfigError` for a run whose task was passed from Python: only that program has the task.
    """
    if config.model.task == HANDED_IN:
        raise ConfigError(
            "model.task = 'handed-in': this run's module and data were passed from a Python program; go on with it by that "
            "program, with resume=True"
        )
    sites = tuple(replace(site, rank=1) for site in config.sites)  # the task does not depend on ranks
    task = _load_task(_numbers_of(config), config.data, config.lora, sites, progress)
    return judged(task, config.eval)


def _numbers_of(config: Config) -> ModelConfig:
    """The model's section. Where single examples or persons are protected, frozen features are float32: in bfloat16, rounding
    makes them depend on the other examples that are encoded with them."""
    automatic = config.privacy.draws_units and config.model.dtype == "auto"
    return replace(config.model, dtype="float32") if automatic else config.model


@functools.lru_cache(maxsize=1)
def _cached_task(model: ModelConfig, data: DataConfig, lora: LoraConfig, sites: Sites) -> list:
    return []


def _load_task(model: ModelConfig, data: DataConfig, lora: LoraConfig, sites: Sites, progress: Progress | None) -> Task:
    if model.file:  # which may read what it likes: nobody knows when it is another task
        return _make(model, data, lora, sites, progress)
    slot = _cached_task(model, data, lora, sites)  # a list, so that `progress` is no part of the key
    if slot and _is_open(slot[0]):  # another federation of this process trains on it
        return _make(model, data, lora, sites, progress)
    if not slot:
        slot.append(_make(model, data, lora, sites, progress))
    return slot[0]


def _is_open(task: Task) -> bool:
    """Whether LoRA is in the place of some of its forward passes."""
    return any("forward" in vars(part) for name, part in task.module.named_modules() if name in task.targets)


def _make(model: ModelConfig, data: DataConfig, lora: LoraConfig, sites: Sites, progress: Progress | None) -> Task:
    make = registry.find(model, data, sites)
    try:
        task = make(registry.Wanted(model, data, lora, cache_dir(), progress, sites))
    except AnyRankError:
        raise
    except Exception as error:
        if not model.file:
            raise
        raise ModelError(f"model.file: {model.file}: task '{model.task}' raised {in_a_line(error)}") from error
    if not isinstance(task, Task):
        raise ModelError(f"model.file: {model.file}: expected an anyrank.Task, got {type(task).__name__}")
    if model.file and task.name == Task.name:  # one of its own it has not: that by which it is registered
        task = replace(task, name=model.task)
    return place(task, model)
