"""The command line. Only what ends it is imported here; the verbs are found when they are asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from anyrank.cli.entry import main

if TYPE_CHECKING:
    from anyrank.cli.verbs import app

__all__ = ["app", "main"]


def __getattr__(name: str):
    if name != "app":
        raise AttributeError(f"module 'anyrank.cli' has no attribute {name!r}")
    return importlib.import_module("anyrank.cli.verbs").app
