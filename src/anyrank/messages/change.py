"""The norm of an upload's change since its download, and scaling an upload down to a given norm.

The norm is taken in coordinates in which a mean of factors is a weighted sum: those of an update of scaling 1. The scaling is
put into the factors as the method does when it changes ranks (`Download.rescale`): `sqrt(s) A` and `sqrt(s) B`, or `A` and
`s B`. In these coordinates, a client's change enters the server's factors multiplied by its weight, for any ranks and
scalings. Plain tensors are unchanged. All layers count together.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import Download

_ROOM = 1e-9  # margin below the bound, because another machine may add in another order
_SHORTER = 0.99  # factor for a change that exceeds the bound by rounding

# The factors by which A and B are multiplied for a scaling, by the factor that takes the scaling.
_UNITS = {"B": lambda scaling: {"A": 1.0, "B": scaling}, "both": lambda scaling: dict.fromkeys("AB", math.sqrt(scaling))}


def units(layer: LoraLayer, rescale: str) -> dict[str, float]:
    """`{"A": a, "B": b}`: `a A` and `b B` are the factors of the same update at scaling 1."""
    return _UNITS[rescale](layer.scaling)


def norm(download: Download, adapter: Adapter) -> float:
    """The norm of the change from `download` to `adapter` in the trained parts."""
    before = download.adapter
    changes = []
    for name, layer in before.layers.items():
        after, unit = adapter.layers[name], units(layer, download.rescale)
        changes += [unit[factor] * _size(getattr(after, factor), getattr(layer, factor)) for factor in download.train]
    return math.hypot(*changes, *(_size(adapter.tensors[name], tensor) for name, tensor in before.tensors.items()))


def clipped(download: Download, trained: Adapter, bound: float) -> Adapter:
    """`trained` with its change scaled down to a stored norm of at most `bound`; no change if the norm is not finite."""
    size = norm(download, trained)
    if not math.isfinite(size):
        return download.adapter
    share = 1.0 if size <= bound else bound / size * (1 - _ROOM)
    while norm(download, moved := _part(download, trained, share)) > bound:
        share *= _SHORTER
    return moved


def _size(now: Tensor, before: Tensor) -> float:
    return float(torch.linalg.vector_norm(now.double() - before.double()))


def _part(download: Download, trained: Adapter, share: float) -> Adapter:
    """The point at `share` of the way from the download to `trained`, in the download's dtypes."""
    before, layers = download.adapter, {}
    for name, layer in before.layers.items():
        to = trained.layers[name]
        A = between(layer.A, to.A, share) if "A" in download.train else layer.A
        B = between(layer.B, to.B, share) if "B" in download.train else layer.B
        layers[name] = layer.with_factors(A, B)
    tensors = {name: between(tensor, trained.tensors[name], share) for name, tensor in before.tensors.items()}
    return replace(before, layers=layers, tensors=tensors)


def between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point at `share` of the way from `start` to `end`, computed in float64, in `start`'s dtype."""
    return (start.double() + share * (end.double() - start.double())).to(start.dtype)
