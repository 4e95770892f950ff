"""Adapters as flat tensors with a description that JSON can hold: the form in which checkpoints store them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer


def pack(prefix: str, adapter: Adapter, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    for name, layer in adapter.layers.items():
        tensors[f"{prefix}/layers/{name}/A"] = layer.A.contiguous()
        tensors[f"{prefix}/layers/{name}/B"] = layer.B.contiguous()
    for name, tensor in adapter.tensors.items():
        tensors[f"{prefix}/tensors/{name}"] = tensor.contiguous()
    layers = {name: [layer.scaling, layer.kind, list(layer.kernel)] for name, layer in adapter.layers.items()}
    return {"layers": layers, "tensors": list(adapter.tensors), "config": dict(adapter.config)}


def unpack(prefix: str, packed: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Adapter:
    layers = {
        name: LoraLayer(
            tensors[f"{prefix}/layers/{name}/A"], tensors[f"{prefix}/layers/{name}/B"], scaling, kind, tuple(kernel)
        )
        for name, (scaling, kind, kernel) in packed["layers"].items()
    }
    return Adapter(layers, {name: tensors[f"{prefix}/tensors/{name}"] for name in packed["tensors"]}, packed["config"])
