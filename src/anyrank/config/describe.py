"""How a key of the configuration is declared: its default with what it means, the values it takes, its names elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field
from typing import Any

# Value ranges that several keys share; errors say them in the same words.
COUNT = "a whole number of at least 1"
NATURAL = "a whole number of at least 0"
POSITIVE = "a number above 0"
NOT_NEGATIVE = "at least 0"

# Marks keys that came after the first form of configurations: at their default, they are no part of what names a run's noise
# (`tables.identity`), so that the same configuration has the same noise in later versions.
LATER = {"later": True}


def key(
    default: Any,
    doc: str,
    values: tuple[Any, ...] | str = "",
    also: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """A field of a section: `doc` says in a sentence or two what it is.

    `values`: the tuple of values that it takes, or its range in words. `also`: what other libraries call it, comma-separated,
    `{"PEFT": "lora_alpha"}`. A class for `default` is called for each configuration. `metadata`: further marks, as `LATER`.
    """
    marks = {"doc": doc, "values": values, "also": dict(also or {}), **(metadata or {})}
    factory: Callable[[], Any] | Any = default if isinstance(default, type) else MISSING
    return field(default_factory=factory, metadata=marks) if factory is not MISSING else field(default=default, metadata=marks)
