"""The methods as table rows: for `anyrank methods`, for the documents, and for checks before torch is loaded.

`catalog.json` in this folder has the rows of the library's own methods. `python -m anyrank.methods.catalog` regenerates it
from the classes, and a test compares the two.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyrank.config.explain import TYPES, Key
from anyrank.files import write_whole_text
from anyrank.methods import registry

FILE = Path(__file__).with_name("catalog.json")


def catalog() -> list[dict[str, Any]]:
    """One entry per registered method, by name: rule, trained factors, traits, options with their values, paper."""
    from anyrank.methods.base import Holds

    entries = []
    for name, kind in sorted(registry.registered().items()):
        traits = {key: value.value if isinstance(value, Holds) else value for key, value in vars(kind.traits).items()}
        options = {field.name: field.default for field in dataclasses.fields(kind)}
        choices = {
            key: list(typing.get_args(hint))
            for key, hint in typing.get_type_hints(kind).items()
            if key in options and typing.get_origin(hint) is typing.Literal
        }
        entry = {"name": name, "summary": kind.summary, "paper": kind.paper, "train": sorted(kind.train)}
        entry |= {"reference": kind.reference, "pools_data": kind.pools_data}
        entries.append(entry | {**traits, "options": options, "choices": choices})
    return entries


@functools.cache
def stored() -> list[dict[str, Any]]:
    """The entries of the library's own methods, from the file. Loads no torch."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raise the error of `make` for a name or an option that the library's own methods do not have. Loads no torch."""
    entries = {entry["name"]: entry for entry in stored()}
    if name not in entries:
        raise registry.unknown(name, entries)
    choices = entries[name]["choices"]
    hints = {
        key: typing.Literal[tuple(choices[key])] if key in choices else type(default)
        for key, default in entries[name]["options"].items()
    }
    registry.checked(name, options, hints)


def check_ranks(name: str, ranks: Sequence[int]) -> None:
    """Raise `ConfigError` where one of the library's own methods cannot take clients of these ranks. Loads no torch."""
    entries = {entry["name"]: entry for entry in stored()}
    if len(set(ranks)) > 1 and not entries[name]["mixed_ranks"] and not entries[name]["pools_data"]:
        others = [other for other, entry in entries.items() if entry["mixed_ranks"] and not entry["reference"]]
        raise registry.needs_one_rank(name, ranks, others)


def check_secure_sum(name: str) -> None:
    """Raise the `ConfigError` of `privacy.secure_sum = true` for one of the library's own methods. Loads no torch."""
    entries = {entry["name"]: entry for entry in stored()}
    raise registry.no_secure_sum(name, entries[name]["linear"] != "no" or len(entries[name]["train"]) == 1)


def option_keys() -> list[Key]:
    """The options as keys of [method], as `anyrank explain` shows them; equal options give one key. Loads no torch."""
    by_name: dict[str, Key] = {}
    users: dict[str, list[str]] = {}
    for entry in stored():
        for name, default in entry["options"].items():
            key = Key(f"method.{name}", "", TYPES[type(default)], tuple(entry["choices"].get(name, ())) or "", default, {})
            of = f"{name} {key.usual}"
            by_name[of] = key
            users.setdefault(of, []).append(entry["name"])
    return [
        replace(key, doc=f"An option of {', '.join(users[of])}; docs/methods.md says what it does there.")
        for of, key in by_name.items()
    ]


def main() -> None:
    """Rewrite `catalog.json`."""
    write_whole_text(FILE, json.dumps(catalog(), indent=1) + "\n")


if __name__ == "__main__":
    main()
