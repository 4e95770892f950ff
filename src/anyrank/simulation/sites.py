"""Clients that are named by whose examples they have: sites of a configuration, or the values of a column."""

from __future__ import annotations

import dataclasses
from typing import Any

from anyrank.config.sections import ClientsConfig, Config
from anyrank.config.sections.sites import alike, fault_of
from anyrank.data import partition, sites
from anyrank.errors import ConfigError, DataError
from anyrank.federation.cohort import Population
from anyrank.federation.standing import MOST_CLIENTS, Sites
from anyrank.tasks.base import Task


def dealt(config: Config, task: Task) -> tuple[Any, ClientsConfig]:
    """The shards of the configuration's clients, and the clients with the names that their examples give them.

    If a column has one value for each client, its values are their names, and the ranks are in the order of the values.
    """
    if config.sites:
        return sites.shards(task.columns, config.clients.names), config.clients
    split, count = config.data.partition, config.clients.count
    shards = partition.partition(split, task.train.labels.cpu(), count, config.run.seed, task.columns)
    values = partition.names_of(split, count, task.columns)
    return shards, _named(config.clients, values, split.column) if values else config.clients


def _named(clients: ClientsConfig, values: tuple[str, ...], column: str) -> ClientsConfig:
    names = clients.names or values
    seen: set[str] = set()
    for name in names:
        fault = fault_of(name) or ("differs from another only in case or accents" if alike(name) in seen else "")
        if fault and clients.names:
            raise ConfigError(f"clients.names: {name!r} {fault}; rename it")
        if fault:
            raise DataError(
                f"data.partition.column: the value {name!r} of column {column!r} names a client, and {fault}; rename it, or "
                "give clients.names"
            )
        seen.add(alike(name))
    order = "cycled" if clients.rank_order == "shuffled" else clients.rank_order
    return dataclasses.replace(clients, names=names, rank_order=order)


def own_scores(config: Config, population: Population, task: Task) -> Sites | None:
    """Whose each held-out example is; `None` if the clients are not named by whose examples they have, if the held-out examples
    do not say it, or if there are too many clients."""
    if config.sites:
        column, values = sites.OWNER, config.clients.names
    else:
        column = config.data.partition.column
        values = partition.names_of(config.data.partition, config.clients.count, task.columns)
    if not values or column not in task.test_columns or len(values) > MOST_CLIENTS:
        return None
    return Sites(population.names, sites.owners(task.test_columns[column], values), population.ranks, population.sizes)
