"""`[[sites]]`: named clients, each with its own files and its own rank."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyrank.config.describe import LATER, key
from anyrank.config.sections.clients import ClientsConfig
from anyrank.config.sections.data import DataConfig
from anyrank.config.sections.values import expect
from anyrank.errors import ConfigError, printable, shortened

AUTO = "auto"
AT_THE_SITE = "at the site"  # in the place of a source that a server does not know
AUTO_RANKS = (4, 8, 16, 32, 64)  # that a site with rank = "auto" chooses from, if clients.ranks says nothing else
_LONGEST = 100  # bytes of a name: it is the name of a folder
_NAME = f"a name of printable characters that a folder can have, of at most {_LONGEST} bytes"
_TAKEN = frozenset({"all-data", "global", "start"})  # of models and clients that are nobody's own
_NOT_IN_FOLDERS = frozenset('/\\:*?"<>|')
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}

NATURAL_GB = "a number of at least 0"
OF_SITES = ("count", "ranks", "rank_order", "names")  # keys of [clients] that the sites stand in for
# Keys that are for one source, whose examples no site would have a part in, or not all of them.
_OF_ONE_SOURCE = ("split", "test_split", "train_examples", "test_examples")


@dataclass(frozen=True)
class SiteConfig:
    """`[[sites]]`: a named client with its own training examples and its own rank; one table for each site. The columns of
    `[data]` hold for the files of all sites. Sites are in the order of their names, whatever their order in the file."""

    name: str = key("", "The site's name in logs, tables and the report, and of its folder `sites/NAME`.", _NAME)
    rank: int | str = key(
        8,
        "The rank of the site's adapter. auto: the largest of clients.ranks (4, 8, 16, 32, 64 if they are not given) at which "
        "a local step, measured before round 1, fits in the site's memory; config.toml of the run has the number.",
        "a whole number of at least 1, or auto",
    )
    source: str = key("", "The site's own training examples, read as data.source is.", "a file or a folder")
    test_source: str = key(
        "",
        "The site's own held-out examples. Empty: data.test_fraction of the site's source, if there is no data.test_source.",
        "a file or a folder, or empty",
    )
    memory_gb: float = key(
        0.0,
        "The site's memory in GB (10^9 bytes), for base model, examples and training. A rank that does not fit is an error. 0: "
        "not limited, and for rank = auto, what is free on this machine.",
        NATURAL_GB,
        metadata=LATER,
    )

    def __post_init__(self) -> None:
        fault = fault_of(self.name)
        expect(not fault, "sites: name", f"{_NAME}, other than {', '.join(sorted(_TAKEN))}", shortened(self.name, 100))
        where = f"sites.{self.name}"
        whole = self.rank == AUTO or (type(self.rank) is int and self.rank >= 1)
        expect(whole, f"{where}.rank", "a whole number of at least 1, or auto", self.rank)
        expect(self.memory_gb >= 0, f"{where}.memory_gb", NATURAL_GB, self.memory_gb)
        expect(bool(self.source), f"{where}.source", "the site's own training examples, a file or a folder", self.source)

    @property
    def files(self) -> dict[str, str]:
        """The files that the site names, by dotted key."""
        named = {f"sites.{self.name}.{name}": getattr(self, name) for name in ("source", "test_source")}
        return {name: path for name, path in named.items() if path}


def fault_of(name: str) -> str:
    """Why no site may have this name, in words; empty if it may."""
    if name in _TAKEN:
        return "has a meaning of its own in a run"
    return "" if _is_folder_name(name) else "cannot be the name of a folder"


def _is_folder_name(name: str) -> bool:
    """Whether every usual system can have a folder of this name, and a terminal can show it."""
    plain = printable(name) == name and not _NOT_IN_FOLDERS & set(name) and name == name.strip()
    device = name.partition(".")[0].casefold() in _DEVICES
    return plain and not name.startswith(".") and not name.endswith(".") and not device and 0 < len(name.encode()) <= _LONGEST


def alike(name: str) -> str:
    """What two names have in common that would share a folder on some system: case, or how accents are written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def in_order(sites: Sequence[SiteConfig]) -> tuple[SiteConfig, ...]:
    """The sites in the order of their names. Raises `ConfigError` for two sites of one name, or of one source."""
    seen: dict[str, str] = {}
    owners: dict[str, str] = {}
    for site in sites:
        if alike(site.name) in seen:
            raise ConfigError(
                f"sites: expected different names, whatever the case of their letters, got {seen[alike(site.name)]!r} and "
                f"{site.name!r}; rename one of them"
            )
        seen[alike(site.name)] = site.name
        other = owners.setdefault(site.source, site.name)
        if other != site.name and site.source != AT_THE_SITE:
            raise ConfigError(
                f"sites: {other} and {site.name} have the same source, {shortened(site.source, 200)!r}, whose examples would "
                f"count twice; give each its own, or {AT_THE_SITE!r} where each site's own file names it"
            )
    return tuple(sorted(sites, key=lambda site: site.name))


def clients_of(sites: Sequence[SiteConfig], given: ClientsConfig) -> Mapping[str, Any]:
    """The keys of `[clients]` that the sites stand in for. Raises `ConfigError` if `given` says otherwise.

    While a site's rank is `auto`, `clients.ranks` are the ranks to choose from.
    """
    ranks = given.ranks if any(site.rank == AUTO for site in sites) else tuple(site.rank for site in sites)
    keys = {"count": len(sites), "ranks": ranks, "rank_order": "cycled", "names": tuple(site.name for site in sites)}
    for name in OF_SITES:
        value = getattr(given, name)
        if value not in (getattr(ClientsConfig(), name), keys[name]):
            raise _stands_in(f"clients.{name}", value)
    return keys


def check_data(data: DataConfig) -> None:
    """Raise `ConfigError` for keys of `[data]` that the sites stand in for, or that are for one source of all clients."""
    usual = DataConfig()
    for name in ("source", "partition"):
        if getattr(data, name) != getattr(usual, name):
            kind = f"partition.kind = {data.partition.kind!r}" if name == "partition" else f"{name} = {data.source!r}"
            raise _stands_in(f"data.{kind}")
    for name in _OF_ONE_SOURCE:
        value = getattr(data, name)
        if value != getattr(usual, name):
            raise ConfigError(
                f"data.{name} = {value!r}: is for one source of all clients, and the [[sites]] have one each; leave it out"
            )


def _stands_in(key: str, value: Any = None) -> ConfigError:
    told = "" if value is None else f" = {list(value) if isinstance(value, tuple) else value!r}"
    return ConfigError(f"{key}{told}: the [[sites]] say which clients there are, with their ranks and sources; leave it out")
