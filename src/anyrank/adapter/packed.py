"""Adapters as flat tensors with a description that JSON can hold: the form in which checkpoints store them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.lazy import Gathered, Lazy, latest, outlined


def pack(prefix: str, adapter: Adapter, tensors: Gathered[torch.Tensor]) -> dict[str, Any]:
    """Add the adapter's tensors to `tensors`; those that are read when they are asked for are read when they are written."""
    shapes, layer_of = outlined(adapter.layers), latest(adapter.layers)
    for name, layer in shapes.items():
        for factor in "AB":
            read = partial(_factor, layer_of, name, factor) if isinstance(adapter.layers, Lazy) else None
            _add(tensors, f"{prefix}/layers/{name}/{factor}", getattr(layer, factor), read)
    for name, tensor in outlined(adapter.tensors).items():
        read = partial(adapter.tensors.__getitem__, name) if isinstance(adapter.tensors, Lazy) else None
        _add(tensors, f"{prefix}/tensors/{name}", tensor, read)
    layers = {name: [layer.scaling, layer.kind, list(layer.kernel)] for name, layer in shapes.items()}
    return {"layers": layers, "tensors": list(adapter.tensors), "config": dict(adapter.config)}


def _add(tensors: Gathered[torch.Tensor], key: str, tensor: torch.Tensor, read: Callable[[], torch.Tensor] | None) -> None:
    if read is None:
        tensors.add(key, tensor.contiguous())
    else:
        tensors.add_later(key, tensor, lambda: read().contiguous())


def _factor(layer_of: Callable[[str], LoraLayer], name: str, factor: str) -> torch.Tensor:
    return getattr(layer_of(name), factor)


def unpack(prefix: str, packed: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Adapter:
    layers = {
        name: LoraLayer(
            tensors[f"{prefix}/layers/{name}/A"], tensors[f"{prefix}/layers/{name}/B"], scaling, kind, tuple(kernel)
        )
        for name, (scaling, kind, kernel) in packed["layers"].items()
    }
    return Adapter(layers, {name: tensors[f"{prefix}/tensors/{name}"] for name in packed["tensors"]}, packed["config"])
