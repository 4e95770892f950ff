"""RoLoRA: A and B by turns, each average exact (Chen et al., NeurIPS 2025, arXiv 2502.01755)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import Client, Download, ServerState
from anyrank.methods.base import Holds, Method, Part, Traits, mean_a, mean_b, slice_weights
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class RoLoRA(Method):
    """Odd rounds train, send and average only B over a common A, even rounds only A under a common B: half the upload.

    With the other factor common, the mean of one factor is the mean of the products. Mixed ranks are our extension: each
    slice is averaged over the clients that have it, and a slice without owners stays unchanged. A download carries both
    factors, because a client keeps nothing between its rounds.
    """

    name = "rolora"
    summary = "alternating: mean of B (odd rounds), mean of A (even), slice by slice over owners"
    paper = "RoLoRA, arXiv 2502.01755"
    traits = Traits(mixed_ranks=True, exact=Holds.EQUAL, linear=Holds.ALWAYS, gauge_free=Holds.NEVER, stationary=Holds.ALWAYS)
    by_owners = True
    weights = staticmethod(slice_weights)
    alternates = True
    train = frozenset({"B"})  # in round 1 and all other odd rounds

    def dispatch(self, state: ServerState, client: Client) -> Download:
        return replace(super().dispatch(state, client), train=frozenset({_turn(state)}))

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        layer = state.adapter.layers[name]
        if _turn(state) == "B":
            return layer.with_factors(layer.A, mean_b(state, name, parts))
        return layer.with_factors(mean_a(state, name, parts), layer.B)


def _turn(state: ServerState) -> str:
    """The factor that is trained in the round after `state`."""
    return "BA"[state.round % 2]
