"""Federated LoRA fine-tuning where every client picks its own rank."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyrank import methods, metrics, partitions, tasks
    from anyrank.adapter import Adapter, LoraLayer
    from anyrank.aggregation import AggregateResult, aggregate
    from anyrank.config import Config
    from anyrank.errors import AnyRankError
    from anyrank.messages.records import ClientUpdate
    from anyrank.simulation import Federation, Result, load
    from anyrank.tasks import Examples, Task

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AggregateResult",
    "AnyRankError",
    "ClientUpdate",
    "Config",
    "Examples",
    "Federation",
    "LoraLayer",
    "Result",
    "Task",
    "aggregate",
    "load",
    "methods",
    "metrics",
    "partitions",
    "tasks",
]

# Resolved on first use, so that `import anyrank` and `anyrank --help` do not wait for torch.
_HOME = {
    "Adapter": "adapter.adapter",
    "LoraLayer": "adapter.layer",
    "AnyRankError": "errors",
    "ClientUpdate": "messages.records",
    "AggregateResult": "aggregation.aggregates",
    "aggregate": "aggregation.aggregates",
    "Config": "config.sections",
    "Examples": "tasks.base",
    "Task": "tasks.base",
    "Federation": "simulation.api",
    "Result": "simulation.api",
    "load": "simulation.api",
}
_ROOMS = {"methods": "methods", "metrics": "tasks.metrics", "partitions": "data.partition", "tasks": "tasks"}


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"anyrank.{_ROOMS[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'anyrank' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anyrank.{_HOME[name]}"), name)
