"""What our side of a job reads in a kit's `local` folder: each party's own files, which no job can change. No torch here.

    server.toml   on the server: `state`, the folder of all runs; relative to the kit's folder, by default `state` in it
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
_RUN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def check_run(name: Any) -> None:
    """Refuse what is no name of a run, which is the name of its folder."""
    if not isinstance(name, str) or not _RUN.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"run: expected at most 64 of a-z, 0-9, '-', '_', '.', with a letter or digit first, got {shortened(repr(name), 100)}"
        )


def state(local: Path) -> Path:
    """The folder that has a folder for each run. Raises `ConfigError`."""
    path = local / SERVER
    table = read_toml(path, "server file") if path.exists() else {}
    unknown = sorted(table.keys() - {"state"})
    if unknown:
        raise ConfigError(f"{path}: expected the key state, got {unknown[0]}")
    folder = table.get("state", "state")
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{path}, state: expected a folder, got {shortened(repr(folder), 100)}")
    return local.parent / folder


@dataclass(frozen=True)
class Limits:
    """Bytes that a question may bring to a site, and that a reply may take from it."""

    download: int
    upload: int


def limits(path: Path) -> Limits:
    """The limits of the site file at `path`. The worker reads the rest of that file. Raises `ConfigError`."""
    section = read_toml(path, "site file").get("limits", {})
    if not isinstance(section, dict):
        raise ConfigError(f"{path}, limits: expected a section, got {shortened(repr(section), 100)}")
    return Limits(_bytes(path, section, "download_mb"), _bytes(path, section, "upload_mb"))


def _bytes(path: Path, section: dict[str, Any], key: str) -> int:
    value = section.get(key, _MEGABYTES)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e7:
        raise ConfigError(f"{path}, limits.{key}: expected a number above 0, at most 1e7, got {shortened(repr(value), 100)}")
    return int(value * 1_000_000)
