"""Declare a key of the configuration: its default, its meaning, the values it takes, its names in other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field
from typing import Any

# Value ranges that several keys share; errors use the same words.
COUNT = "a whole number of at least 1"
NATURAL = "a whole number of at least 0"
POSITIVE = "a number above 0"
NOT_NEGATIVE = "at least 0"

# Marks keys that were added after the first version of configurations. At their default, they are not part of the name of a
# run's noise (`tables.identity`), so that the same configuration has the same noise in later versions.
LATER = {"later": True}


def key(
    default: Any,
    doc: str,
    values: tuple[Any, ...] | str = "",
    also: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """Declare a field of a section: `doc` describes it in a sentence or two.

    `values`: the tuple of values that it takes, or its range in words. `also`: its names in other libraries, comma-separated,
    `{"PEFT": "lora_alpha"}`. If `default` is a class, it is called for each configuration. `metadata`: further marks, such as
    `LATER`.
    """
    marks = {"doc": doc, "values": values, "also": dict(also or {}), **(metadata or {})}
    factory: Callable[[], Any] | Any = default if isinstance(default, type) else MISSING
    return field(default_factory=factory, metadata=marks) if factory is not MISSING else field(default=default, metadata=marks)
