"""A list of files in `data.source`: a short form of `[[sites]]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyrank.config.sections import Config
from anyrank.config.sections.sites import fault_of
from anyrank.errors import ConfigError, shortened


def with_files(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with a site for each file in `data.source`: named after the file, with the ranks of `clients.ranks` in order."""
    files, clients = table["data"]["source"], table.get("clients", {})
    if "sites" in table:
        raise ConfigError(
            "data.source: a list of files makes a site of each, and there are [[sites]] too; leave one of them out"
        )
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigError(f"data.source: expected a file, or a list of at least one file, got {shortened(repr(files), 200)}")
    if not isinstance(clients, Mapping):
        raise ConfigError(f"clients: expected a table of keys, got {clients!r}")
    ranks = clients.get("ranks", Config().clients.ranks)
    if not isinstance(ranks, (list, tuple)) or not ranks:
        raise ConfigError(f"clients.ranks: expected a list of at least one rank, got {shortened(repr(ranks), 200)}")
    sites = [
        {"name": name, "rank": ranks[place % len(ranks)], "source": file}
        for place, (name, file) in enumerate(zip(_names(files), files, strict=True))
    ]
    data = {key: value for key, value in table["data"].items() if key != "source"}
    clients = {key: value for key, value in clients.items() if key != "ranks"}
    return {**table, "sites": sites, "data": data, "clients": clients}


def _names(files: Sequence[str]) -> list[str]:
    names = [Path(file).stem for file in files]
    for name in names:
        if fault := fault_of(name):
            raise ConfigError(
                f"data.source: each file's name names a client, and {name!r} {fault}; rename it, or use [[sites]]"
            )
    return names
