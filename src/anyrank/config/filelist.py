"""A list of files, or a pattern of their names, in `data.source`: a short form of `[[sites]]`."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyrank.config.sections import Config
from anyrank.config.sections.sites import fault_of
from anyrank.errors import ConfigError, shortened

MOST_FILES = 1_000  # as many as are reported one by one
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_WILD = frozenset("*?[")


def is_pattern(source: Any) -> bool:
    """Whether `source` is a pattern such as `sites/*.csv`: `*`, `?` or `[` in its last part, and no file of that very name."""
    return isinstance(source, str) and bool(_WILD & set(os.path.basename(source))) and not os.path.lexists(source)


def expanded(pattern: str) -> list[str]:
    """The files of a folder whose names match, sorted; hidden files and folders are left out, and links to files are followed.

    Raises `ConfigError` for a folder that cannot be read, for no file, for files that are no tables or of several kinds, and
    for more than `MOST_FILES`.
    """
    folder, name = os.path.split(pattern)
    told = f"data.source = {shortened(pattern, 200)!r}"
    try:
        names = [each for each in os.listdir(folder or ".") if not each.startswith(".") and fnmatch.fnmatchcase(each, name)]
    except (OSError, ValueError) as error:  # a ValueError for a NUL character
        raise ConfigError(
            f"{told}: {folder or '.'} cannot be read ({getattr(error, 'strerror', None) or error}); name a folder"
        ) from None
    files = [path for each in sorted(names) if not (path := Path(folder, each)).is_dir()]
    kinds = sorted({path.suffix.lower() for path in files})
    if not files:
        raise ConfigError(f"{told}: no file in {folder or '.'} has such a name; correct the pattern")
    if len(files) > MOST_FILES:
        raise ConfigError(f"{told}: expected at most {MOST_FILES:,} files, one for each client, got {len(files):,}")
    if len(kinds) > 1 or kinds[0] not in TABLES:
        odd = next(path.name for path in files if len(kinds) > 1 or path.suffix.lower() not in TABLES)
        got = ", ".join(kind or "no ending" for kind in kinds)
        raise ConfigError(
            f"{told}: expected tables of one kind ({', '.join(TABLES)}), got {got} ({shortened(odd, 100)}); give the ending in "
            "the pattern, as in *.csv"
        )
    return [str(path) for path in files]


def with_files(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with a site for each file in `data.source`: named after the file, with the ranks of `clients.ranks` in order."""
    files, clients = table["data"]["source"], table.get("clients", {})
    if "sites" in table:
        raise ConfigError(
            "data.source: a list of files makes a site of each, and there are [[sites]] too; leave one of them out"
        )
    files = expanded(files) if isinstance(files, str) else files
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
