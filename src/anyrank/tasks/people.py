"""The persons of a task's training examples, and how many of them each client has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anyrank.config.sections import Config, DataConfig
from anyrank.data import people
from anyrank.data.partition import SampledShards
from anyrank.errors import DataError
from anyrank.tasks.base import Task


def of(task: Task, data: DataConfig) -> np.ndarray:
    """The person of each training example as a number from 0, `[n]` int64.

    Raises `DataError` for examples that name nobody, and for a person with held-out examples, as far as their column is there.
    """
    names = people.ids(task.columns, data.person)
    if data.person in task.test_columns:
        people.check_apart(names, people.ids(task.test_columns, data.person), data.person)
    return people.numbers(names)


def counted(config: Config, task: Task, shards: Any) -> np.ndarray | None:
    """How many persons each client has, `[clients]` int64; `None` if no person is protected (`privacy.level`).

    Raises `DataError` if a person has examples at more than one client: what is spent would add up over these.
    """
    if not config.data.person:
        return None
    own = of(task, config.data)
    if config.privacy.level != "person":
        return None
    if isinstance(shards, SampledShards):  # which the privacy plan refuses
        return shards.sizes
    at = [np.unique(own[np.asarray(shards[client])]) for client in range(len(shards))]
    counts = np.array([len(each) for each in at], dtype=np.int64)
    shared = int(counts.sum()) - len(np.unique(np.concatenate(at)))
    if shared:
        several = np.unique(np.concatenate(at), return_counts=True)[1]
        raise DataError(_SHARED[bool(config.sites)](config, int((several > 1).sum())))
    return counts


def _over_clients(config: Config, number: int) -> str:
    column, split = config.data.person, config.data.partition
    return (
        f"data.partition: kind = '{split.kind}' gives the examples of {number} persons (data.person = {column!r}) to several "
        f"clients, whose privacy costs would add up; expected kind = 'column' with column = {column!r}, or with one that all "
        "examples of a person agree in, or [[sites]]"
    )


def _over_sites(config: Config, number: int) -> str:
    return (
        f"sites: {number} persons (data.person = {config.data.person!r}) have examples at several sites, whose privacy costs "
        "would add up; if they are different persons, put the site's name in front of theirs; else keep each at one site"
    )


_SHARED: dict[bool, Callable[[Config, int], str]] = {False: _over_clients, True: _over_sites}  # by whether there are [[sites]]
