"""Products of factors, their SVD, and sums that are added to the base weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.messages.records import ServerState
from anyrank.methods.parts import Part

Split = Literal["singular-in-b", "balanced"]


# --- products, and their SVD -----------------------------------------------------------------------------------------


def weighted_product(parts: Sequence[Part], weights: Tensor) -> lowrank.Product:
    """`sum_k sum_j w_kj s_k B_k[:, j] A_k[j]`, as factors, for weights `[K, R]`."""
    return lowrank.stack([lowrank.of_layer(layer, w[: layer.rank]) for (layer, *_), w in zip(parts, weights, strict=True)])


class Unsettled(NamedTuple):
    """A new layer whose product is not decomposed yet, so that the products of many layers can be decomposed as one batch.

    `finish` makes the layer of the product's top `rank` triples, or of all (`None`).
    """

    product: lowrank.Product
    rank: int | None
    finish: Callable[[lowrank.SVD], LoraLayer]


def settled(layers: Sequence[LoraLayer | Unsettled]) -> list[LoraLayer]:
    """The layers, after the SVD of those that still needed one."""
    waiting = [layer for layer in layers if isinstance(layer, Unsettled)]
    found = iter(lowrank.svd_all([layer.product for layer in waiting], [layer.rank for layer in waiting]))
    return [layer.finish(next(found)) if isinstance(layer, Unsettled) else layer for layer in layers]


def top_of(state: ServerState, name: str, product: lowrank.Product, split: Split) -> Unsettled:
    """The server's layer from the top of `product`'s SVD (see `from_svd`), not decomposed yet; for `merge_layer` to return."""
    return Unsettled(product, state.rank_of(name), lambda found: from_svd(state, name, found, split))


def from_product(state: ServerState, name: str, product: lowrank.Product, split: Split) -> LoraLayer:
    """Like `top_of`, but decomposed at once."""
    return settled([top_of(state, name, product, split)])[0]


def from_svd(state: ServerState, name: str, found: lowrank.SVD, split: Split) -> LoraLayer:
    """The server's layer with the product of `found`: `B = U S / s`, `A = Vt`, or the square root of S in each (balanced)."""
    layer, (U, S, Vt) = state.adapter.layers[name], found
    if len(S) == 0:  # The product is zero: one factor stays as it was, so that the next round can train
        keeps_a = bool(layer.A.any())  # an embedding starts with A zero and B random
        return layer.with_factors(layer.A, torch.zeros_like(layer.B)) if keeps_a else layer
    if split == "balanced":
        root = (S / layer.scaling).sqrt()
        return layer.with_factors(root[:, None] * Vt, U * root)
    return layer.with_factors(Vt, U * (S / layer.scaling))


def empty_slices(state: ServerState, name: str, weights: Tensor) -> lowrank.Product:
    """The server's own previous slices that no client of the round has, as a product."""
    layer = state.adapter.layers[name]
    return lowrank.of_layer(layer, (weights.sum(dim=0) == 0).double())


# --- the sum in the base weight --------------------------------------------------------------------------------------

# Singular values below this share of the largest are dropped from the sum in the base weight: float32's rounding.
_ROUNDING = 1e-7


def add_to_base(state: ServerState, name: str, product: lowrank.Product) -> LoraLayer | None:
    """The sum in the base weight so far plus `product`, as one layer of scaling 1; `None` while the sum is zero.

    The sum is exact: the factors are appended. When they have more numbers than the weight itself, the sum is rewritten by
    its SVD, at its numerical rank, so that its rank stays below `min(out, in)` after any number of rounds.
    """
    layer = state.adapter.layers[name]
    before = state.merged.layers.get(name) if state.merged else None
    total = balanced(product)
    if before:
        total = lowrank.stack([lowrank.of_layer(before), total])
    out, width = layer.shape
    if total.slices * (out + width) > out * width:
        total = balanced(total, min(_ROUNDING, torch.finfo(layer.A.dtype).eps))
    if total.slices == 0:
        return before.with_factors(0 * before.A[:1], 0 * before.B[:, :1]) if before else None
    return layer.with_factors(total.right, total.left, scaling=1.0)


def balanced(product: lowrank.Product, floor: float = 0.0) -> lowrank.Product:
    """`product` by its SVD, `U sqrt(S)` and `sqrt(S) Vt`, without the singular values below `floor` times the largest."""
    U, S, Vt = lowrank.svd(lowrank.Product(product.left, product.right))  # in float64 for any dtype: errors would add up
    keep = int((floor * S.max() <= S).sum()) if len(S) else 0
    root = S[:keep].sqrt()
    return lowrank.Product(U[:, :keep] * root, root[:, None] * Vt[:keep])
