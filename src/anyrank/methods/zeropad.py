"""Zero-padding: the naive way to average unequal ranks (the baseline of Cho et al. 2024 and of RBLA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ServerState
from anyrank.methods.base import Holds, Method, Part, Traits, average_layer, padded_weights
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class ZeroPad(Method):
    """Pad every factor to the largest rank with zeros, then average: slice j comes out `pi_j` times RBLA's.

    A client that lacks a slice counts as zero in it, so what only large-rank clients learned fades away.
    """

    name = "zeropad"
    summary = "factors padded with zeros, then mean"
    paper = "baseline of HetLoRA, EMNLP 2024"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.ALWAYS, gauge_free=Holds.NEVER, stationary=Holds.EQUAL)
    rescale = "both"
    weights = staticmethod(padded_weights)

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        rank = state.rank_of(name)
        return average_layer(state, name, parts, self.weights(parts, rank))
