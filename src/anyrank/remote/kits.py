"""What our side of a job reads in a kit's `local` folder: each party's own files, which no job can change. No torch here.

server.toml   on the server; may be absent. `state`: the folder of all runs, relative to the kit's folder, by default `state`
              in it; `reply_mb`: the largest reply of a site; `memory_gb`: memory of a job's process, by default without limit
site.toml     at a site: the site's own file, for its worker
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank.config.tables import read_toml
from anyrank.errors import ConfigError, shortened

SERVER, SITE = "server.toml", "site.toml"
_MEGABYTES = 1_000.0  # as a site file's own default
_HEADERS = 16 << 20  # bytes of frames beside their arrays, which the site file's limits do not count
_RUN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def check_run(name: Any) -> None:
    """Refuse what is no name of a run, which is the name of its folder."""
    if not isinstance(name, str) or not _RUN.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"run: expected at most 64 of a-z, 0-9, '-', '_', '.', a letter or digit first, got {shortened(repr(name), 100)}"
        )


@dataclass(frozen=True)
class Server:
    """`state`: the folder that has a folder for each run. `reply`: bytes of a site's reply at most. `memory`: bytes that the
    process of a job may take, 0 without a limit: the guard against a site that sends more than it declares, which NVFlare takes
    into memory before anybody can look at it."""

    state: Path
    reply: int
    memory: int


def server(local: Path) -> Server:
    """The server's own file, which may be absent. Raises `ConfigError`."""
    path = local / SERVER
    table = read_toml(path, "server file") if path.exists() else {}
    known = ("state", "reply_mb", "memory_gb")
    if unknown := sorted(table.keys() - set(known)):
        raise ConfigError(f"{path}: expected the keys {', '.join(known)}, got {shortened(repr(unknown[0]), 100)}")
    folder = table.get("state", "state")
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{path}, state: expected a folder, got {shortened(repr(folder), 100)}")
    memory = 1_000 * _bytes(path, table, "memory_gb") if "memory_gb" in table else 0
    return Server(local.parent / folder, _bytes(path, table, "reply_mb"), memory)


@dataclass(frozen=True)
class Limits:
    """Bytes that a question may bring to a site, and that a reply may take from it, with the headers of its frames."""

    download: int
    upload: int


def limits(path: Path) -> Limits:
    """The limits of the site file at `path`. The worker reads the rest of that file. Raises `ConfigError`."""
    section = read_toml(path, "site file").get("limits", {})
    if not isinstance(section, dict):
        raise ConfigError(f"{path}, limits: expected a section, got {shortened(repr(section), 100)}")
    down, up = (_bytes(f"{path}, limits", section, key) for key in ("download_mb", "upload_mb"))
    return Limits(down + _HEADERS, up + _HEADERS)


def _bytes(where: object, section: dict[str, Any], key: str) -> int:
    """Megabytes as bytes."""
    value = section.get(key, _MEGABYTES)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e7:
        raise ConfigError(f"{where}, {key}: expected a number above 0, at most 1e7, got {shortened(repr(value), 100)}")
    return int(value * 1_000_000)
