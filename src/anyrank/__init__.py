"""Federated LoRA fine-tuning where every client picks its own rank."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyrank.adapter import Adapter, LoraLayer
    from anyrank.aggregation import AggregateResult, aggregate
    from anyrank.errors import AnyRankError
    from anyrank.messages.records import ClientUpdate

__version__ = "0.1.0"
__all__ = ["Adapter", "AggregateResult", "AnyRankError", "ClientUpdate", "LoraLayer", "aggregate"]

# Resolved on first use, so that `import anyrank` and `anyrank --help` do not wait for torch.
_HOME = {
    "Adapter": "adapter",
    "LoraLayer": "adapter",
    "AnyRankError": "errors",
    "ClientUpdate": "messages.records",
    "AggregateResult": "aggregation",
    "aggregate": "aggregation",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'anyrank' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anyrank.{_HOME[name]}"), name)
