"""How far an upload is from its download, and uploads that are brought within a given norm of it.

The norm is taken in the coordinates in which a mean of factors is a weighted sum: those of an update of scaling 1, with the
scaling in the factors as the method puts it there when it changes ranks (`Download.rescale`): `sqrt(s) A` and `sqrt(s) B`, or
`A` and `s B`. There a client's change enters the server's factors times its weight, whatever the ranks and scalings of both.
Plain tensors are taken as they are. All layers count together.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import Download

_ROOM = 1e-9  # left below the bound, for sums that another machine adds up in another order
_SHORTER = 0.99  # what is left of a change whose rounding went past the bound

# What A and B are multiplied by under a scaling, by which of them takes it up.
_UNITS = {"B": lambda scaling: {"A": 1.0, "B": scaling}, "both": lambda scaling: dict.fromkeys("AB", math.sqrt(scaling))}


def units(layer: LoraLayer, rescale: str) -> dict[str, float]:
    """`{"A": a, "B": b}`: `a A` and `b B` are the factors of the same update at scaling 1."""
    return _UNITS[rescale](layer.scaling)


def norm(download: Download, adapter: Adapter) -> float:
    """The norm of the change from `download` to `adapter` in what was to be trained."""
    before = download.adapter
    changes = [units(layer, download.rescale)[factor] * _size(getattr(adapter.layers[name], factor), getattr(layer, factor))
               for name, layer in before.layers.items() for factor in download.train]  # fmt: skip
    return math.hypot(*changes, *(_size(adapter.tensors[name], tensor) for name, tensor in before.tensors.items()))


def clipped(download: Download, trained: Adapter, bound: float) -> Adapter:
    """`trained`, its change scaled down to a norm of at most `bound`, as it is stored; no change where it is not finite."""
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
    """`share` of the way from the download to `trained`, in the download's own dtypes."""
    before, layers = download.adapter, {}
    for name, layer in before.layers.items():
        to = trained.layers[name]
        A = _between(layer.A, to.A, share) if "A" in download.train else layer.A
        B = _between(layer.B, to.B, share) if "B" in download.train else layer.B
        layers[name] = layer.with_factors(A, B)
    tensors = {name: _between(tensor, trained.tensors[name], share) for name, tensor in before.tensors.items()}
    return replace(before, layers=layers, tensors=tensors)


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    return (start.double() + share * (end.double() - start.double())).to(start.dtype)
