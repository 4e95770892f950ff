"""Configurations to and from TOML. Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from anyrank.config import explain
from anyrank.config.filelist import is_pattern, with_files
from anyrank.config.sections import Config, SiteConfig
from anyrank.config.sections.run import WHERE
from anyrank.config.sections.sites import AUTO, AUTO_RANKS, OF_SITES
from anyrank.errors import ConfigError, in_a_line, nearest, shortened
from anyrank.files import check_depth, read_bounded

# Sections that are planned but not supported by this version: an error, never ignored.
_NOT_YET = {"track": "tracking to TensorBoard or MLflow"}
_PATHS = (
    *(("model", "path"), ("model", "file"), ("data", "source"), ("data", "test_source"), ("data", "partition", "file")),
    *(("method", "file"), ("eval", "file")),
)
_MOST_BYTES = 1 << 20  # of a file of settings
_MOST_DOTS, _BETWEEN = 100, re.compile(r"[\n=,{}\[\]]")  # of a key, which stands between two of these characters


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table in a TOML file; `ConfigError` where there is none. `what` it should be, in a word."""
    try:
        return parse_toml(read_bounded(path, _MOST_BYTES).decode("utf-8-sig"))  # some editors mark UTF-8
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a TOML {what}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {in_a_line(error)}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The table in a TOML text. Raises `ValueError`, also for values that cannot be handled in a bounded time.

    tomllib takes time in the square of the number of dots in a key; and it reads whole numbers of any size, where TOML has 64
    bits.
    """
    if any(part.count(".") > _MOST_DOTS for part in _BETWEEN.split(text)):
        raise ValueError(f"expected keys of at most {_MOST_DOTS} parts, got a longer one")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("lists and tables are nested too deep") from None
    _check_values(table)
    return table


def _check_values(table: Any) -> None:
    """Raise `ValueError` for what no TOML file holds."""
    check_depth(table)
    waiting = [table]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError("expected whole numbers of at most 64 bits, got a larger one")
        elif isinstance(value, str) and not _is_unicode(value):
            raise ValueError(f"expected Unicode text, got {shortened(ascii(value), 100)}")
        elif not isinstance(value, (str, int, float, date, time)):
            raise ValueError(f"expected text, numbers, dates, lists and tables, got {type(value).__name__}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: how Python has a byte of the command line that is no UTF-8
        return False
    return True


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a TOML file, with `section.key=value` overrides.

    Relative paths start at the file's folder; if a path is not there, at the folder `$ANYRANK_DATA`.
    """
    path = Path(path)
    table = read_toml(path, "configuration")
    if not any(table.values()):
        raise ConfigError(
            f"{path}: expected a configuration, got an empty file; give at least the base model, [model] name or path "
            "(anyrank explain lists all keys)"
        )
    for *sections, key in _PATHS:
        holder = table
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(key), str) and holder[key]:
            holder[key] = _found(holder[key], path.parent)
    data = table.get("data")
    if isinstance(data, dict) and isinstance(data.get("source"), list):
        data["source"] = [_found(file, path.parent) if isinstance(file, str) and file else file for file in data["source"]]
    if isinstance(data, dict) and is_pattern(data.get("source")):  # the folder of which is found as a file is
        folder, name = os.path.split(data["source"])
        data["source"] = os.path.join(_found(folder or ".", path.parent), name)
    for site in table["sites"] if isinstance(table.get("sites"), list) else ():
        for key in ("source", "test_source"):
            if isinstance(site, dict) and isinstance(site.get(key), str) and site[key]:
                site[key] = _found(site[key], path.parent)
    for override in overrides:
        _override(table, override)
    return from_table(table)


def _found(value: str, folder: Path) -> str:
    """The path `value` below `folder`, or else below `$ANYRANK_DATA`; unchanged if it exists in neither."""
    for base in (folder, *(Path(base) for base in [os.environ.get("ANYRANK_DATA")] if base)):
        if not Path(value).is_absolute() and _exists(base / value):
            return str((base / value).resolve())
    return value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, for example: whoever reads it says so
        return False


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `section.key=value` overrides."""
    table = to_table(config)
    for text in overrides:
        _override(table, text)
    return from_table(table)


def from_table(table: Mapping[str, Any]) -> Config:
    """The configuration in a parsed TOML table."""
    try:
        _check_values(table)
    except ValueError as error:
        raise ConfigError(f"configuration: {error}") from None
    for section, what in _NOT_YET.items():
        if section in table:
            raise ConfigError(
                f"[{section}]: {what} is not supported by this version of anyrank; remove the section to run without it"
            )
    table = dict(table)
    method = table.get("method")
    if isinstance(method, Mapping) and "options" not in method:
        known = {"name", "file", "handed_in"}
        options = {key: value for key, value in method.items() if key not in known}
        table["method"] = {key: value for key, value in method.items() if key in known} | {"options": options}
    source = table["data"].get("source") if isinstance(table.get("data"), Mapping) else None
    if isinstance(source, (list, tuple)) or is_pattern(source):
        table = with_files(table)
    if "sites" in table:
        table = _with_sites(table)
    return _build(Config, table, "")


def _with_sites(table: dict[str, Any]) -> dict[str, Any]:
    """`table` with its sites read. All sites take part in every round, unless the table says how many."""
    listed = table["sites"]
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ConfigError(f"sites: expected a table [[sites]] for each site, got {listed!r}; add one, or leave it out")
    sites = []
    for number, site in enumerate(listed, start=1):
        name = site.get("name") if isinstance(site, Mapping) else None
        where = f"sites.{name}" if isinstance(name, str) and name else f"sites[{number}]"
        sites.append(_build(SiteConfig, site, where))
    clients = table.get("clients", {})
    if isinstance(clients, Mapping):
        usual = {"ranks": AUTO_RANKS} if any(site.rank == AUTO for site in sites) else {}
        clients = {"participation": 1.0} | usual | clients
    return table | {"sites": tuple(sites), "clients": clients}


def to_table(config: Config) -> dict[str, Any]:
    """The whole configuration as a TOML table: `from_table` gives the same configuration back."""
    table = dataclasses.asdict(config)
    table["method"] |= table["method"].pop("options")
    for section in (table["model"], table["data"]["partition"], table["method"]):
        if not section["handed_in"]:
            del section["handed_in"]  # never written by hand
    for name in OF_SITES if config.sites else ():
        if name != "ranks" or not config.undecided:
            del table["clients"][name]  # the sites say these
    for site in table["sites"]:
        if not site["memory_gb"]:
            del site["memory_gb"]  # runs of earlier versions have no such key
    if not config.sites:
        del table["sites"]
    return _plain(table)


def identity(config: Config) -> dict[str, Any]:
    """The table that identifies a configuration in all versions: newer keys are left out if they have their default, and so are
    those that say where clients train."""
    config = elsewhere(config, Config())
    table = to_table(config)
    _drop_defaults(config, table)
    return table


def elsewhere(config: Config, other: Config) -> Config:
    """`config` with clients that train where those of `other` do."""
    return config.replace(run={name: getattr(other.run, name) for name in WHERE})


def _drop_defaults(section: Any, table: dict[str, Any]) -> None:
    for key in dataclasses.fields(section):
        value = getattr(section, key.name)
        if dataclasses.is_dataclass(value):
            _drop_defaults(value, table[key.name])
        elif key.metadata.get("later") and value == _default(key):
            table.pop(key.name, None)
    for name in [name for name, held in table.items() if held == {} and name != "options"]:
        del table[name]  # a section that came later, and says nothing


def _default(key: dataclasses.Field) -> Any:
    return key.default if key.default is not dataclasses.MISSING else key.default_factory()


def _override(table: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not 2 <= len(keys) <= _MOST_DOTS or not all(keys):
        known = explain.keys()
        meant = [key.path for key in known if key.path.split(".")[1:] == keys] if equals else []
        example = f"did you mean {meant[0]}={text}?" if len(meant) == 1 else "e.g. train.learning_rate=1e-3"
        raise ConfigError(f"--set {override}: expected section.key=value, {example}")
    if keys[0] == "sites":
        raise ConfigError(f"--set {override}: the [[sites]] are set in the file of the configuration only; change them there")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set method.name=rbla
    except ValueError as error:
        raise ConfigError(f"--set {override}: {in_a_line(error)}") from None
    for name in keys[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {name} is not a section")
    table[keys[-1]] = value


def read_section(kind: type, table: Any, where: str = "") -> Any:
    """A dataclass of keys and sections from a table that is no run's configuration. Raises `ConfigError` as `from_table` does,
    with hints at the keys of `kind` alone."""
    try:
        _check_values(table)
    except ValueError as error:
        raise ConfigError(f"{where or 'table'}: {error}") from None
    return _build(kind, table, where, lambda name: "")


def _build(kind: type, table: Any, where: str, hint: Callable[[str], str] = explain.hint) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table of keys, got {table!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(table.keys() - hints.keys())
    if unknown:
        what = f"{where}.{unknown[0]}" if where else f"[{unknown[0]}]"
        meant = hint(unknown[0]) or nearest(unknown[0], hints)  # a name of another section or library, or a misspelling
        raise ConfigError(f"{what}: unknown {'key' if where else 'section'}; {meant}")
    values = {}
    for name, value in table.items():
        path = f"{where}.{name}" if where else name
        section = dataclasses.is_dataclass(hints[name])
        values[name] = _build(hints[name], value, path, hint) if section else _typed(hints[name], value, path)
    return kind(**values)


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_typed(arguments[0], item, where) for item in value)
    if origin in (types.UnionType, typing.Union):
        lists = [argument for argument in arguments if typing.get_origin(argument) is tuple]
        if lists and isinstance(value, (list, tuple)):
            return _typed(lists[0], value, where)
        if any(type(value) is argument for argument in arguments):
            return value
    elif origin is not None:
        return dict(value)
    elif hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: expected a finite number, got {value!r}")
        return float(value)
    elif type(value) is hint:
        return value
    names = " or ".join(
        "list" if typing.get_origin(each) is tuple else explain.TYPES.get(each, each.__name__) for each in arguments
    )
    names = names or explain.TYPES.get(hint, hint.__name__)
    raise ConfigError(f"{where}: expected {names}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
