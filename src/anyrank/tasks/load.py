"""From a configuration to its task."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path

from anyrank.config.sections import OWN_HEADS, Config, DataConfig, LoraConfig, ModelConfig
from anyrank.progress import Progress
from anyrank.tasks.base import Task, judged
from anyrank.tasks.place import place

# The room of each `model.task`: a module of `anyrank.tasks` with `load(model, data, lora, cache, progress) -> Task`.
_TASKS = {"image-classification": "vision.task", "text-classification": "text.task", "causal-lm": "language.task"}


def cache_dir() -> Path:
    """Where frozen features and pretrained demo models are kept between runs: `$ANYRANK_CACHE`, or the user's cache."""
    chosen = os.environ.get("ANYRANK_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "anyrank"


def load_task(config: Config, progress: Progress | None = None) -> Task:
    """The task that a configuration describes; the last one is kept, so that a grid of runs loads it once."""
    task = _load_task(config.model, config.data, config.lora, progress)
    return judged(task, config.eval)


@functools.lru_cache(maxsize=1)
def _cached_task(model: ModelConfig, data: DataConfig, lora: LoraConfig) -> list:
    return []


def _load_task(model: ModelConfig, data: DataConfig, lora: LoraConfig, progress: Progress | None) -> Task:
    slot = _cached_task(model, data, lora)  # a list, so that `progress` is no part of the key
    if not slot:
        room = importlib.import_module(f"anyrank.tasks.{_room(model, data)}")  # a task's own imports may be heavy
        slot.append(place(room.load(model, data, lora, cache_dir(), progress), model))
    return slot[0]


def _room(model: ModelConfig, data: DataConfig) -> str:
    """The module of `anyrank.tasks` that a configuration's task is made by."""
    if model.task == "image-classification" and data.source == "digits":
        return "vision.digits"
    return "text.own_head" if model.head in OWN_HEADS else _TASKS[model.task]
