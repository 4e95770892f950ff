"""The tasks by name. One line, `register`, makes a user's task available everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anyrank import own
from anyrank.config.sections import OWN_HEADS, DataConfig, LoraConfig, ModelConfig, SiteConfig
from anyrank.errors import ModelError, nearest
from anyrank.progress import Progress

if TYPE_CHECKING:
    from anyrank.tasks.base import Task


@dataclass(frozen=True)
class Wanted:
    """The inputs for making a task: the sections `model`, `data` and `lora` of a configuration, the folder `cache` for results
    to keep between runs, `progress(done, total)`, or `None`, and the named `sites` whose examples it has, if there are any.
    """

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig
    cache: Path
    progress: Progress | None = None
    sites: tuple[SiteConfig, ...] = ()


Make = Callable[[Wanted], "Task"]

OWN: dict[str, Make] = {}

# `model.task` -> the module that makes it; imported when it is needed, because its own imports may be heavy.
_BUILT_IN = {
    "image-classification": "anyrank.tasks.vision.task",
    "text-classification": "anyrank.tasks.text.task",
    "causal-lm": "anyrank.tasks.language.task",
}


def register(name: str) -> Callable[[Make], Make]:
    """Decorator: register `function(wanted) -> Task` as `model.task = name`. Built-in names are refused.

    `wanted` has the configuration's sections `model`, `data` and `lora`, see `Wanted`.
    """
    if not isinstance(name, str) or not name:
        raise ModelError(f"tasks.register: expected a name, as in @register('mine'), got {name!r}")
    if name in _BUILT_IN:
        raise ModelError(f"tasks.register: '{name}' is a built-in task; choose another name")

    def keep(make: Make) -> Make:
        OWN[name] = make
        return make

    return keep


def find(model: ModelConfig, data: DataConfig, sites: Sequence[SiteConfig] = ()) -> Make:
    """The function that makes the configured task; `model.file` is executed first, if it is set.

    Raises `ModelError` for a file that registers no task, or not the named one.
    """
    if model.file:
        return _from_file(model)
    import importlib

    embedded = model.task == "image-classification" and data.source == "digits" and not sites
    module = importlib.import_module("anyrank.tasks.vision.digits" if embedded else _room(model))
    more = {"sites": sites} if sites else {}
    return lambda wanted: module.load(wanted.model, wanted.data, wanted.lora, wanted.cache, wanted.progress, **more)


def _from_file(model: ModelConfig) -> Make:
    wanted = f"task; expected a function under @anyrank.tasks.register('{model.task}')"
    made = own.registered(model.file, "model.file", ModelError, OWN, wanted)
    if model.task in made:
        return made[model.task]
    if len(made) == 1 and model.task == ModelConfig().task:  # nobody named one
        return next(iter(made.values()))
    raise ModelError(f"model.task: {model.file} registers no task '{model.task}'; {nearest(model.task, made)}")


def _room(model: ModelConfig) -> str:
    """The module that makes a task of the user's own examples."""
    return "anyrank.tasks.text.own_head" if model.head in OWN_HEADS else _BUILT_IN[model.task]
