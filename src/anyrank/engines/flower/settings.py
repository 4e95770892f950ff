"""What our side reads in a folder of the server or of a site: `flower.toml`, which no run can change. No torch, no flwr.

A server's folder has `flower.toml`, `runs` (a folder for each run) and `state` (Flower's own files); a site's has
`flower.toml`, `site.toml` (see docs/site-file.md) and `state`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anyrank.config.tables import read_toml
from anyrank.errors import ConfigError, nearest, shortened
from anyrank.messages.limits import MOST_HEADER_BYTES

FILE, SITE, STATE, RUNS, SECRET = "flower.toml", "site.toml", "state", "runs", "superexec.key"
_ADDRESS = re.compile(r"[A-Za-z0-9._-]{1,253}:[0-9]{1,5}|\[[0-9A-Fa-f:.]{2,45}\]:[0-9]{1,5}")


@dataclass(frozen=True)
class Server:
    """`port`: of the SuperLink, on loopback. `names`: who says which node is which site, the owner's registration of a key
    ("registered") or the node itself ("claimed"). `certificate`, `key`, `ca`: PEM files for TLS; all or none. `reply_mb`: the
    largest reply of a site. `memory_gb`: memory of the process that runs the rounds, 0 without a limit."""

    port: int = 8000
    names: str = "registered"
    certificate: str = ""
    key: str = ""
    ca: str = ""
    reply_mb: float = 1_000.0
    memory_gb: float = 0.0

    def __post_init__(self) -> None:
        _check_port("port", self.port)
        _check(self.names in ("registered", "claimed"), "names", "'registered' or 'claimed'", self.names)
        given = [bool(path) for path in (self.certificate, self.key, self.ca)]
        _check(all(given) or not any(given), "certificate", "certificate, key and ca, or none of them", self.certificate)
        _check(self.names == "claimed" or all(given), "names", "certificate, key and ca with 'registered'", self.names)
        _check(0 < self.reply_mb <= 1e7, "reply_mb", "a number above 0, at most 1e7", self.reply_mb)
        _check(0 <= self.memory_gb <= 1e5, "memory_gb", "a number from 0 to 1e5", self.memory_gb)

    @property
    def reply(self) -> int:
        """Bytes of all frames of a reply at most, with their headers."""
        return int(self.reply_mb * 1_000_000) + MOST_HEADER_BYTES


@dataclass(frozen=True)
class Site:
    """`server`: host and port of the SuperLink, or of the proxy before it. `port`: of the SuperNode, on loopback. `ca`: the PEM
    file of who signed the server's certificate; `key`: the site's own private key. `python`: the interpreter of the worker,
    where it has packages that Flower's environment cannot have; empty: the same one."""

    server: str = "127.0.0.1:8000"
    port: int = 9094
    ca: str = ""
    key: str = ""
    python: str = ""

    def __post_init__(self) -> None:
        _check(bool(_ADDRESS.fullmatch(self.server)), "server", "HOST:PORT", self.server)
        _check_port("port", self.port)
        _check(not self.key or bool(self.ca), "ca", "the server's CA with a key: keys need TLS", self.ca)


_S = TypeVar("_S", Server, Site)


def load(kind: type[_S], folder: Path) -> _S:
    """The settings in a folder; its paths, where they are relative, from that folder. Raises `ConfigError`."""
    path = folder / FILE
    table, known = read_toml(path, "settings"), {each.name: each.default for each in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {shortened(repr(key), 100)}; {nearest(key, known)}")
        right = isinstance(value, type(known[key])) or (isinstance(known[key], float) and isinstance(value, int))
        if not right or (isinstance(value, bool) and not isinstance(known[key], bool)):
            raise ConfigError(f"{path}, {key}: expected a {type(known[key]).__name__}, got {shortened(repr(value), 100)}")
    for key in ("certificate", "key", "ca", "python"):
        if table.get(key):
            table[key] = str(folder.absolute() / table[key])
    try:
        return kind(**table)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None


def _check_port(key: str, value: Any) -> None:
    _check(1 <= value <= 65535, key, "a whole number from 1 to 65535", value)


def _check(right: bool, key: str, expected: str, got: Any) -> None:
    if not right:
        raise ConfigError(f"{key}: expected {expected}, got {shortened(repr(got), 100)}")
