"""Which examples of a task each client has, and what a server is to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anyrank.config.sections import Config
from anyrank.config.sections.sites import alike, fault_of
from anyrank.data import partition, sites
from anyrank.errors import ConfigError, DataError
from anyrank.messages.roster import MOST_CLIENTS, POOLED, Roster
from anyrank.tasks import people
from anyrank.tasks.base import Task


def dealt(config: Config, task: Task) -> tuple[Any, tuple[str, ...]]:
    """The shards of the configuration's clients, and the names that their examples give them (empty: none).

    If a column has one value for each client, its values are their names, and the ranks are in the order of the values.
    """
    if config.sites:
        return sites.shards(task.columns, config.clients.names), config.clients.names
    split, count = config.data.partition, config.clients.count
    shards = partition.partition(split, task.train.labels.cpu(), count, config.run.seed, task.columns)
    values = _values(config, task)
    return shards, _checked(config.clients.names, values, split.column) if values else ()


def _values(config: Config, task: Task) -> tuple[str, ...]:
    """The values of a column that name the clients, each of which has one; empty if there are none, or if a value names a
    person who is protected."""
    split = config.data.partition
    if config.privacy.level == "person" and split.column == config.data.person:
        return ()
    return partition.names_of(split, config.clients.count, task.columns)


def _checked(given: tuple[str, ...], values: tuple[str, ...], column: str) -> tuple[str, ...]:
    """The clients' names: the `given` ones, or else the values of the column."""
    seen: set[str] = set()
    for name in given or values:
        fault = fault_of(name) or ("differs from another only in case or accents" if alike(name) in seen else "")
        if fault and given:
            raise ConfigError(f"clients.names: {name!r} {fault}; rename it")
        if fault:
            raise DataError(
                f"data.partition.column: the value {name!r} of column {column!r} names a client, and {fault}; rename it, or "
                "give clients.names"
            )
        seen.add(alike(name))
    return given or values


def roster(config: Config, task: Task, shards: Any, named: tuple[str, ...] = (), pools: bool = False) -> Roster:
    """What a server is to know of `shards`, the clients' examples; `named`: the names that their examples give them; `pools`:
    whether the method gathers all examples in one place. Where persons are protected (`privacy.level`), sizes count persons."""
    if config.eval.where == "sites" and task.metrics:
        raise ConfigError(
            f"eval.where = 'sites': the task has metrics of its own ({', '.join(task.metrics)}), which need the results of all "
            "clients in one place; use 'server'"
        )
    owners, persons = _owners(config, task), people.counted(config, task, shards)
    return Roster(
        names=named or config.clients.names,
        sizes=np.asarray(shards.sizes if persons is None else persons, np.int64),
        pooled=len(partition.pooled(shards)[0]) if pools else 0,
        facts=task.facts(bare=config.privacy.level != "none"),
        in_order=bool(named),
        by_label=_by_label(shards, task) if persons is None else None,
        owners=owners,
        held_out=None if owners is None else np.bincount(owners[owners >= 0], minlength=len(shards)).astype(np.int64),
    )


def held_out(names: Sequence[str], owners: np.ndarray | None) -> dict[str, np.ndarray]:
    """The held-out examples of each of the clients `names` that has any, as sorted indices `[n]` int64; `owners` `[m]`: the
    place in `names` of each one's owner. Of the client that has the examples of all, those of all."""
    if owners is None:
        return {}
    found = {name: np.flatnonzero(owners == place) for place, name in enumerate(names)} | {POOLED: np.flatnonzero(owners >= 0)}
    return {name: index for name, index in found.items() if len(index)}


def _owners(config: Config, task: Task) -> np.ndarray | None:
    """Whose each held-out example is; `None` if the clients are not named by whose examples they have, if the held-out examples
    do not say it, or if there are too many clients."""
    if config.sites:
        column, values = sites.OWNER, config.clients.names
    else:
        column = config.data.partition.column
        values = _values(config, task)
    if not values or column not in task.test_columns or len(values) > MOST_CLIENTS:
        return None
    return sites.owners(task.test_columns[column], values)


def _by_label(shards: Any, task: Task) -> np.ndarray | None:
    """The clients' numbers of examples by label; `None` if labels are not classes, or if there are too many clients."""
    if len(shards) > MOST_CLIENTS or not task.has_classes:
        return None
    labels = task.train.labels.cpu().numpy()
    width = int(labels.max()) + 1
    return np.array([np.bincount(labels[np.asarray(shards[i])], minlength=width) for i in range(len(shards))], np.int64)
