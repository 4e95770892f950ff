"""What is trained and how it is scored: the task interface, and the built-in tasks."""

from __future__ import annotations

import importlib

__all__ = ["Examples", "Task", "Wanted", "register"]

_HOME = {"Examples": "base", "Task": "base", "Wanted": "registry", "register": "registry"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'anyrank.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anyrank.tasks.{_HOME[name]}"), name)
