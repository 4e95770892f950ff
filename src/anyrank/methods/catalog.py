"""The methods as rows: for `anyrank methods`, and for the tables of the documents, which a test compares with it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from anyrank.methods import REGISTRY, Holds


def catalog() -> list[dict[str, Any]]:
    """One entry a method, by name: rule, trained factors, traits, options with their values, paper."""
    entries = []
    for name, kind in sorted(REGISTRY.items()):
        traits = {key: value.value if isinstance(value, Holds) else value for key, value in vars(kind.traits).items()}
        options = {field.name: field.default for field in dataclasses.fields(kind)}
        choices = {
            key: list(typing.get_args(hint))
            for key, hint in typing.get_type_hints(kind).items()
            if key in options and typing.get_origin(hint) is typing.Literal
        }
        entry = {"name": name, "summary": kind.summary, "paper": kind.paper, "train": sorted(kind.train)}
        entries.append(entry | {**traits, "options": options, "choices": choices})
    return entries
