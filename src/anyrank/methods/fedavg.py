"""FedAvg on the factors, as in FedIT (Zhang et al. 2023, arXiv 2305.05644)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ServerState
from anyrank.methods.base import Holds, Method, Part, Traits, average_layer, slice_weights
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FedAvg(Method):
    """`A = sum p_k A_k`, `B = sum p_k B_k`, for clients of one rank.

    Inexact: the mean of products is not the product of means. Deviation: factors are averaged as `sqrt(s_k) A_k`,
    `sqrt(s_k) B_k`, which is the plain mean if all scalings are equal, and correct if they differ.
    """

    name = "fedavg"
    summary = "mean of A, mean of B"
    paper = "FedIT, arXiv 2305.05644"
    traits = Traits(mixed_ranks=False, exact=Holds.NEVER, linear=Holds.EQUAL, gauge_free=Holds.NEVER, stationary=Holds.EQUAL)
    rescale = "both"
    weights = staticmethod(slice_weights)

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        return average_layer(state, name, parts, slice_weights(parts, parts[0].layer.rank))
