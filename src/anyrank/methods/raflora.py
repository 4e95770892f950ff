"""raFLoRA: rank-partitioned aggregation of products (Wu et al. 2026, arXiv 2602.13486, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyrank.algebra import lowrank
from anyrank.messages.records import ServerState
from anyrank.methods.base import (
    EmptySlice,
    Holds,
    Method,
    Part,
    Split,
    Traits,
    Unsettled,
    empty_slices,
    slice_weights,
    top_of,
    weighted_product,
)
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class RaFLoRA(Method):
    """`W = sum_j sum over owners of q_kj s_k B_k[:, j] A_k[j]`, then the SVD share: each slice over its owners.

    All slices between two neighbouring ranks have the same owners, so the sum by slice is the paper's sum by partition.
    A slice without an owner in the round stays as the server held it (`empty_slice = "keep"`: the paper's own rule is
    not known to us) or is dropped (`"zero"`). With equal ranks this is FlexLoRA.
    """

    name = "raflora"
    summary = "mean of products, slice by slice over owners, SVD share"
    paper = "raFLoRA, arXiv 2602.13486"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.NEVER, gauge_free=Holds.EQUAL, stationary=Holds.ALWAYS)
    by_owners = True

    split: Split = "singular-in-b"
    empty_slice: EmptySlice = "keep"

    @property
    def rescale(self):
        return "both" if self.split == "balanced" else "B"

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> Unsettled:
        weights = slice_weights(parts, state.rank_of(name))
        product = weighted_product(parts, weights)
        if self.empty_slice == "keep":
            product = lowrank.stack([product, empty_slices(state, name, weights)])
        return top_of(state, name, product, self.split)
