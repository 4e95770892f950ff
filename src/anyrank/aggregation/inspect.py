"""Inspect adapters: ranks, scaling, norms, spectra, effective rank, energy past each rank. One layer at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.stored import open_adapter, outline
from anyrank.algebra import lowrank
from anyrank.algebra.spectra import effective_rank, energy, energy_beyond
from anyrank.errors import AdapterError

Progress = Callable[[int, int], None]
_SHOWN = 8


def inspect_folders(
    folders: Sequence[str | os.PathLike[str]], progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """One report per PEFT folder: a dict of plain numbers, with `layers` (one entry each) and `total`.

    Energy past a rank is the share of `sum of sigma^2` beyond it, at the same ranks for all folders: the powers of two below
    the largest rank. `values` are the largest singular values of `scaling * B @ A`.
    """
    adapters = {os.fspath(folder): open_adapter(folder) for folder in folders}
    outlines = {name: outline(adapter) for name, adapter in adapters.items()}
    largest = max(rank for adapter in outlines.values() for rank in adapter.ranks.values())
    levels = [2**power for power in range(max(1, math.ceil(math.log2(largest))))]
    total, done, reports = sum(len(adapter.layers) for adapter in outlines.values()), 0, []
    for name, adapter in adapters.items():
        spectra = {}
        for layer in sorted(adapter.layers):
            spectra[layer] = _spectrum(adapter.layers[layer], f"{name}, layer {layer}")
            done += 1
            progress(done, total)
        reports.append({"adapter": str(Path(name)), **report(outlines[name], spectra, levels)})
    return reports


def _spectrum(layer: LoraLayer, where: str) -> Tensor:
    try:
        values = lowrank.spectrum(lowrank.of_layer(layer))
        if math.isfinite(energy(values)):
            return values
    except torch.linalg.LinAlgError:  # where a number on the way is not finite
        pass
    raise AdapterError(f"{where}: its numbers are too large to compute with; the training that made it diverged")


def report(adapter: Adapter, spectra: Mapping[str, Tensor], levels: Sequence[int]) -> dict[str, Any]:
    """The figures of one adapter, from the singular values of its layers."""
    layers = []
    for name, values in spectra.items():
        layer = adapter.layers[name]
        out, width = layer.shape
        entry = {"layer": name, "kind": layer.kind, "out": out, "in": width, "rank": layer.rank, "scaling": layer.scaling}
        layers.append(entry | _figures({name: values}, levels) | {"values": values[:_SHOWN].tolist()})
    numbers = sum(layer.A.numel() + layer.B.numel() for layer in adapter.layers.values())
    total = {"layers": len(layers), "ranks": sorted(set(adapter.ranks.values())), "numbers": numbers}
    return {
        "base_model": adapter.config.get("base_model_name_or_path"),
        "dtypes": sorted({str(layer.A.dtype).removeprefix("torch.") for layer in adapter.layers.values()}),
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(adapter.tensors.items())},
        "layers": layers,
        "total": total | _figures(spectra, levels),
    }


def _figures(spectra: Mapping[str, Tensor], levels: Sequence[int]) -> dict[str, Any]:
    """Norm, effective rank and energy past each level, over the layers of `spectra` together."""
    return {
        "norm": math.sqrt(sum(energy(values) for values in spectra.values())),
        "effective_rank": effective_rank(spectra),
        "energy_past": {str(level): energy_beyond(spectra, level) for level in levels},
    }
