"""RBLA: rank-based LoRA aggregation (Chen et al. 2024, arXiv 2408.08699, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ServerState
from anyrank.methods.base import EmptySlice, Holds, Method, Part, Traits, average_layer, slice_weights
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class RBLA(Method):
    """`A[j] = sum over owners of q_kj A_k[j]`, the same for B: each slice averaged over the clients that have it.

    A slice without an owner in the round is missing, not zero: it stays as the server held it (`empty_slice = "keep"`) or is
    dropped (`"zero"`). With equal ranks this is FedAvg. Deviation from the paper, which has one scaling: factors are averaged
    as `sqrt(s_k) A_k`, `sqrt(s_k) B_k` and dispatched in the same way.
    """

    name = "rbla"
    summary = "mean of A, mean of B, slice by slice over owners"
    paper = "RBLA, arXiv 2408.08699"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.ALWAYS, gauge_free=Holds.NEVER, stationary=Holds.ALWAYS)
    by_owners = True
    rescale = "both"
    weights = staticmethod(slice_weights)

    empty_slice: EmptySlice = "keep"

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        weights = self.weights(parts, state.rank_of(name))
        kept = self.empty_slice == "keep" and bool((weights.sum(dim=0) == 0).any())
        return average_layer(state, name, parts, weights, empty=state.adapter.layers[name] if kept else None)
