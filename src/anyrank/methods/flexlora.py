"""FlexLoRA: products are averaged and dispatched by SVD (Bai et al., NeurIPS 2024, arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyrank.messages.records import ServerState
from anyrank.methods.base import (
    Holds,
    Method,
    Part,
    Split,
    Traits,
    Unsettled,
    client_weights,
    ownership,
    top_of,
    weighted_product,
)
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FlexLoRA(Method):
    """`W = sum p_k s_k B_k A_k`; a client of rank r gets `B = U_r S_r / s(r)`, `A = V_r^T`.

    A client that lacks slice j counts as zero in it, so the part beyond the smallest rank shrinks by its coverage each
    round: rank collapse. `split = "balanced"` gives each factor the square root of S.
    """

    name = "flexlora"
    summary = "mean of products, SVD share"
    paper = "FlexLoRA, arXiv 2402.11505"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.NEVER, gauge_free=Holds.ALWAYS, stationary=Holds.EQUAL)

    split: Split = "singular-in-b"

    @property
    def rescale(self):
        return "both" if self.split == "balanced" else "B"

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> Unsettled:
        weights = client_weights(parts)[:, None] * ownership(parts, state.rank_of(name))
        return top_of(state, name, weighted_product(parts, weights), self.split)
