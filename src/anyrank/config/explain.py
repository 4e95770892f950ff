"""Describe the keys of a configuration, from their declarations: for `anyrank explain`, the documents, and errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyrank.config.sections import READ_BY, TASKS, Config
from anyrank.errors import ConfigError, nearest

TYPES = {str: "string", int: "whole number", float: "number", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    `path`: its dotted name. `doc`: its description. `type`: its TOML type. `values`: the values that it takes, or their range
    in words. `default`: its default. `also`: its names in other libraries, `{library: names}`. `tasks`: the tasks that it is
    for (empty: all).
    """

    path: str
    doc: str
    type: str
    values: tuple[Any, ...] | str
    default: Any
    also: Mapping[str, tuple[str, ...]]
    tasks: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def takes(self) -> str:
        """The values in words; empty if any value of the type is allowed."""
        return self.values if isinstance(self.values, str) else ", ".join(map(_toml, self.values))

    @property
    def usual(self) -> str:
        """The default, as TOML writes it."""
        return _toml(self.default)

    @property
    def elsewhere(self) -> str:
        """Its names in other libraries, in words."""
        return "; ".join(f"{library}: {', '.join(names)}" for library, names in self.also.items())

    @property
    def limits(self) -> str:
        """Which tasks it is for, in words; empty if for all."""
        if set(self.tasks) == set(TASKS):
            return "Not for the embedded digits."
        named = [task.replace("image-classification", "images of your own source") for task in self.tasks]
        return f"For {' and '.join(named)} only." if named else ""

    def table(self) -> dict[str, Any]:
        """The key as JSON writes it."""
        return {"key": self.path} | {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}


@functools.cache
def sections() -> dict[str, str]:
    """The description of each section, by its dotted name."""
    return dict(_sections(Config, ""))


@functools.cache
def keys() -> tuple[Key, ...]:
    """All keys, in the order of the sections and of their declarations."""
    return tuple(_keys(Config, ""))


def _sections(kind: type, where: str):
    hints = typing.get_type_hints(kind)
    if where:
        doc = " ".join((kind.__doc__ or "").partition("`: ")[2].split())
        yield where, doc[:1].upper() + doc[1:]
    for field in dataclasses.fields(kind):
        inner = _table(hints[field.name])
        if inner:
            yield from _sections(inner, _below(where, field.name))


def _keys(kind: type, where: str):
    hints, inner = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        hint, path = hints[field.name], _below(where, field.name)
        if _table(hint):
            inner.append((_table(hint), path))
            continue
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        also = {library: tuple(names.split(", ")) for library, names in field.metadata.get("also", {}).items()}
        told = field.metadata.get("doc", ""), _type(hint), field.metadata.get("values", "")
        yield Key(path, *told, default, also, READ_BY.get((where, field.name), ((), ""))[0])
    for hint, path in inner:
        yield from _keys(hint, path)


def _table(hint: Any) -> type | None:
    """The section that a field holds, or that each item of its list is; `None` for a key."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    return hint if dataclasses.is_dataclass(hint) else None


def bracketed(section: str) -> str:
    """A section's heading as TOML writes it: `[lora]`, or `[[sites]]` for a list of tables."""
    repeated = typing.get_origin(typing.get_type_hints(Config).get(section)) is tuple
    return f"[[{section}]]" if repeated else f"[{section}]"


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"list of {_type(arguments[0])}s"
    if origin in (types.UnionType, typing.Union):
        return ", or ".join("list of them" if typing.get_origin(each) is tuple else _type(each) for each in arguments)
    return TYPES.get(hint, "table")


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


# --- finding a key by a name --------------------------------------------------------------------------------------------


def elsewhere(word: str, pool: Sequence[Key]) -> list[Key]:
    """The keys of `pool` that another library calls `word`."""
    said = _plain(word)
    return [key for key in pool if said in {_plain(name) for names in key.also.values() for name in names}]


def named(word: str, pool: Sequence[Key]) -> list[Key]:
    """The keys of `pool` that are `word`: by dotted path, or else by name in any section, or else by another library's name."""
    by_path = [key for key in pool if key.path == word]
    return by_path or [key for key in pool if key.name == word] or elsewhere(word, pool)


def find(word: str, options: Sequence[Key] = ()) -> list[Key]:
    """The keys of the section `word`, or the keys named `word`; if there are none, `ConfigError` with the nearest name.

    `options`: the keys of the methods' options in [method].
    """
    pool = [*keys(), *options]
    found = [key for key in pool if word in (key.section, key.section.rpartition(".")[2])] or named(word, pool)
    if not found:
        meant = hint(word.rpartition(".")[2])  # `train.lr`, `run.alpha`: the right name in a wrong section
        raise ConfigError(f"{word}: no key or section has this name; {meant or _near(word, pool)}")
    return found


def _near(word: str, pool: Sequence[Key]) -> str:
    """The nearest of all names; if none is near, the list of sections."""
    known = {name for key in pool for name in (key.path, key.name)} | set(sections())
    others = {name for key in pool for names in key.also.values() for name in names}
    close = nearest(word, known | others)
    return close if close.startswith("did you mean") else f"known sections: {', '.join(sections())}"


def hint(word: str) -> str:
    """A hint at the keys that have this name in another section or library; empty if there are none."""
    found = named(word, keys())
    return f"did you mean {' or '.join(key.path for key in found)}?" if found else ""


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()
