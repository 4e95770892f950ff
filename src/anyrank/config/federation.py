"""`federation.toml`: who takes part in a federation over real machines, and where its server is. No figures of a run.

The owner writes it (`anyrank deploy init`), and kits are made from it (`anyrank deploy provision`). It holds no secret.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyrank.config.sections.sites import alike, fault_of
from anyrank.config.tables import read_toml
from anyrank.errors import ConfigError, nearest, shortened

FILE = "federation.toml"
OWNER, VIEWER = "owner", "viewer"
ROLES = (OWNER, VIEWER)
MOST_SITES = 1_000
_LONGEST = 63  # characters of a name in a certificate
_SITE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*", re.ASCII)
_PERSON = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}", re.ASCII)
_NUMBERS = re.compile(r"[0-9.]+")
_TAKEN = frozenset({"server", "admin", "client", "all"})  # words of the engine's own commands


@dataclass(frozen=True)
class ServerPlace:
    """`[server]`: where sites and people reach the server. `localhost`: this machine only, and nobody else can connect."""

    host: str = "localhost"
    other_hosts: tuple[str, ...] = ()
    port: int = 8002

    def __post_init__(self) -> None:
        for name in (self.host, *self.other_hosts):
            check_host(name)
        check_port(self.port)


@dataclass(frozen=True)
class Expiry:
    """`[certificates]`: for how many days a kit's certificate, and the root certificate, are valid."""

    days: int = 360
    root_days: int = 3650

    def __post_init__(self) -> None:
        for name in ("days", "root_days"):
            value = getattr(self, name)
            if not 1 <= value <= 36_500:
                raise ConfigError(f"certificates.{name}: expected a number of days from 1 to 36500, got {value!r}")
        if self.days > self.root_days:
            raise ConfigError(
                f"certificates.days = {self.days}: expected at most root_days = {self.root_days}, since no certificate "
                "outlives the root that signed it"
            )


@dataclass(frozen=True)
class Person:
    """`[[people]]`: who has a kit for commands. `role`: an owner submits, stops and resumes runs; a viewer looks only."""

    name: str = ""
    role: str = ""

    def __post_init__(self) -> None:
        if not _PERSON.fullmatch(self.name) or len(self.name) > _LONGEST:
            raise ConfigError(
                f"people: name: expected the form of an e-mail address, such as owner@example.org, of at most {_LONGEST} "
                f"characters, got {shortened(self.name, 100)!r}"
            )
        if self.role not in ROLES:
            raise ConfigError(f"people.{self.name}.role: expected one of {', '.join(ROLES)}, got {self.role!r}")


@dataclass(frozen=True)
class FederationFile:
    """A whole `federation.toml`. `sites` are in the order of their names."""

    name: str = ""
    sites: tuple[str, ...] = ()
    server: ServerPlace = field(default_factory=ServerPlace)
    certificates: Expiry = field(default_factory=Expiry)
    people: tuple[Person, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        check_sites(self.sites)
        object.__setattr__(self, "sites", tuple(sorted(self.sites)))
        names = [alike(person.name) for person in self.people]
        twice = next((person.name for person in self.people if names.count(alike(person.name)) > 1), "")
        if twice:
            raise ConfigError(f"people: expected different names, got {twice!r} twice; rename one of them")
        if not any(person.role == OWNER for person in self.people):
            raise ConfigError(
                'people: expected at least one owner, got none; add [[people]] name = "you@example.org", role = "owner"'
            )
        if alike(self.server.host) in map(alike, self.sites):
            raise ConfigError(
                f"sites: {self.server.host!r} is the name of the server's host, too; a certificate's name is for one party; "
                "rename the site"
            )


def check_name(name: str) -> None:
    """Raise `ConfigError` unless `name` can be that of a federation, a folder and a certificate."""
    if not _SITE.fullmatch(name) or len(name) > _LONGEST or fault_of(name):
        raise ConfigError(
            f"name: expected a name of letters, digits, '-' and '_', of at most {_LONGEST} characters, got "
            f"{shortened(name, 100)!r}"
        )


def check_sites(names: Sequence[str]) -> None:
    """Raise `ConfigError` unless these can be the sites of one federation: as `[[sites]]`, and as names in certificates."""
    if not 1 <= len(names) <= MOST_SITES:
        raise ConfigError(f"sites: expected from 1 to {MOST_SITES:,} names, got {len(names):,}")
    seen: dict[str, str] = {}
    for name in names:
        if not _SITE.fullmatch(name) or len(name) > _LONGEST:
            raise ConfigError(
                f"sites: expected names of letters, digits, '-' and '_' that do not begin with '-', of at most {_LONGEST} "
                f"characters, since they stand in certificates, got {shortened(name, 100)!r}"
            )
        fault = "is a word of the engine's own" if name.casefold() in _TAKEN else fault_of(name)
        if fault:
            raise ConfigError(f"sites: {name!r} {fault}; choose another name")
        if alike(name) in seen:
            raise ConfigError(
                f"sites: expected different names, whatever the case of their letters, got {seen[alike(name)]!r} and {name!r}; "
                "rename one of them"
            )
        seen[alike(name)] = name


def check_host(host: str) -> None:
    """Raise `ConfigError` unless `host` can be a host's name or IPv4 address in a certificate."""
    fits = bool(_HOST.fullmatch(host)) and len(host) <= _LONGEST
    if fits and _NUMBERS.fullmatch(host):
        fits = _is_address(host)
    if not fits:
        raise ConfigError(
            f"server: host: expected a host's name or IPv4 address, of at most {_LONGEST} characters, without a port, such as "
            f"fl.example.org, got {shortened(host, 100)!r}"
        )


def _is_address(host: str) -> bool:
    try:
        return not ipaddress.IPv4Address(host).is_unspecified
    except ValueError:
        return False


def check_port(port: int) -> None:
    """Raise `ConfigError` unless a user's program can listen at `port`."""
    if not 1 <= port <= 65_535:
        raise ConfigError(f"server.port: expected a whole number from 1 to 65535, got {port!r}")


def load(path: Path) -> FederationFile:
    """The file at `path`, or `federation.toml` in the folder `path`. Raises `ConfigError`, in one line with the path."""
    path = path / FILE if path.is_dir() else path
    table = read_toml(path, "file of a federation; anyrank deploy init writes one")
    try:
        return from_table(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_table(table: Mapping[str, Any]) -> FederationFile:
    """The federation in a parsed TOML table. Unknown keys are errors that name the nearest one."""
    sections = {"server": ServerPlace, "certificates": Expiry}
    read = {name: _section(kind, table[name], name) for name, kind in sections.items() if name in table}
    people = table.get("people", [])
    if not isinstance(people, list):
        raise ConfigError(f"people: expected a table [[people]] for each, got {shortened(repr(people), 100)}")
    read["people"] = tuple(_section(Person, each, "people") for each in people)
    plain = {name: value for name, value in table.items() if name not in read}
    return _section(FederationFile, plain, "", read)


def _section(kind: type, table: Any, where: str, read: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table of keys, got {shortened(repr(table), 100)}")
    fields = {each.name: each for each in dataclasses.fields(kind)}
    for name in table:
        if name not in fields:
            raise ConfigError(f"{where}{'.' if where else ''}{name}: unknown key; {nearest(name, fields)}")
    values = {name: _typed(fields[name].type, value, f"{where}.{name}".lstrip(".")) for name, value in table.items()}
    return kind(**values, **read)


def _typed(hint: str, value: Any, where: str) -> Any:
    if hint == "tuple[str, ...]":
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        raise ConfigError(f"{where}: expected a list of strings, got {shortened(repr(value), 100)}")
    wanted, words = {"str": (str, "a string"), "int": (int, "a whole number")}[hint]
    if type(value) is not wanted:
        raise ConfigError(f"{where}: expected {words}, got {shortened(repr(value), 100)}")
    return value
