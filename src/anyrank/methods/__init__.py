"""The aggregation methods, one file per method. Names are imported on first use, so that looking one up needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyrank.methods.base import Holds, Method, Part, Traits
    from anyrank.methods.registry import REGISTRY, load_file, make, register

__all__ = ["REGISTRY", "Holds", "Method", "Part", "Traits", "load_file", "make", "register"]

_HOME = {
    **dict.fromkeys(("Holds", "Method", "Part", "Traits"), "base"),
    **dict.fromkeys(("REGISTRY", "load_file", "make", "register"), "registry"),
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'anyrank.methods' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anyrank.methods.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
