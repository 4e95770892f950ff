"""Average factors slice by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ServerState
from anyrank.methods.parts import Part, slice_weights

EmptySlice = Literal["keep", "zero"]


# --- factors averaged slice by slice ---------------------------------------------------------------------------------


# Numbers of a block that is summed at a time, in float64: half a megabyte, which stays in a core's cache until it is rounded.
_BLOCK = 1 << 16


def average_slices(parts: Sequence[Part], weights: Tensor, empty: LoraLayer | None = None) -> tuple[Tensor, Tensor]:
    """`sum_k w_kj sqrt(s_k) A_k[j]` and the same of B: factors `[R, in]`, `[out, R]` (float64) of an update of scaling 1.

    The root of each client's scaling goes to each factor, so that clients with different alpha/r average what they apply.
    Slices that no client has are zero, or those of `empty`.
    """
    return _averages(parts, weights, empty, 1.0, torch.float64)


def average_layer(
    state: ServerState, name: str, parts: Sequence[Part], weights: Tensor, empty: LoraLayer | None = None
) -> LoraLayer:
    """The server's layer from the averages of `average_slices`, half of `1/s(R)` to each factor, rounded once."""
    layer = state.adapter.layers[name]  # not its outline, whose type is narrower under noise at the server
    return layer.with_factors(*_averages(parts, weights, empty, layer.scaling, layer.A.dtype))


def _averages(
    parts: Sequence[Part], weights: Tensor, empty: LoraLayer | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The averages as factors of an update of this `scaling`, summed in float64, in `dtype`."""
    layers, rank = [part.layer for part in parts], weights.shape[1]
    first, (out, width) = layers[0], layers[0].shape
    shares = [math.sqrt(layer.scaling / scaling) * w[: layer.rank] for layer, w in zip(layers, weights, strict=True)]
    shares = [share.to(first.A.device) for share in shares]
    A, B = first.A.new_empty(rank, width, dtype=dtype), first.B.new_empty(out, rank, dtype=dtype)
    _sum_into(A, [layer.A for layer in layers], [share[:, None] for share in shares])
    _sum_into(B, [layer.B for layer in layers], [share.expand(out, -1) for share in shares])
    if empty is not None:
        lone = (weights[:, : empty.rank].sum(dim=0) == 0).nonzero().squeeze(1).to(A.device)
        root = math.sqrt(empty.scaling / scaling)
        A[lone] = (root * empty.A[lone].double()).to(dtype)
        B[:, lone] = (root * empty.B[:, lone].double()).to(dtype)
    return A, B


def _sum_into(total: Tensor, factors: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
    """`total[i, j] = sum_k shares[k][i, j] factors[k][i, j]` over the factors that have an entry (i, j); the rest is zero."""
    step = max(1, _BLOCK // total.shape[1])
    room = total.new_empty(min(step, len(total)), total.shape[1], dtype=torch.float64)
    for start in range(0, len(total), step):
        rows = slice(start, min(start + step, len(total)))
        block = room[: rows.stop - start].zero_()
        for factor, share in zip(factors, shares, strict=True):
            part = factor[rows]
            block[: len(part), : part.shape[1]].addcmul_(share[rows], part)  # each number is converted to float64 here
        total[rows] = block


# --- one factor averaged slice by slice, the other one shared ---------------------------------------------------------


def mean_a(state: ServerState, name: str, parts: Sequence[Part]) -> Tensor:
    """`sum over owners of q_kj A_k[j]`, `[R, in]` (float64); a slice that no client of the round has stays unchanged."""
    layer = state.adapter.layers[name]
    weights = slice_weights(parts, layer.rank).to(layer.A.device)
    A = layer.A.double() * (weights.sum(dim=0) == 0)[:, None]
    for (sent, *_), w in zip(parts, weights, strict=True):
        A[: sent.rank] += w[: sent.rank, None] * sent.A.double()
    return A


def mean_b(state: ServerState, name: str, parts: Sequence[Part]) -> Tensor:
    """`sum over owners of q_kj s_k / s(R) B_k[:, j]`, `[out, R]` (float64); a slice that no client has stays unchanged."""
    layer = state.adapter.layers[name]
    weights = slice_weights(parts, layer.rank).to(layer.B.device)
    B = layer.B.double() * (weights.sum(dim=0) == 0)
    for (sent, *_), w in zip(parts, weights, strict=True):
        B[:, : sent.rank] += w[: sent.rank] * (sent.scaling / layer.scaling) * sent.B.double()
    return B
