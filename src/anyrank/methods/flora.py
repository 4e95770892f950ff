"""FLoRA: stacked adapters are added to the base model, and clients restart (Wang et al., NeurIPS 2024, arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anyrank import keys
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ServerState
from anyrank.methods.base import Holds, Method, Part, Traits, add_to_base, client_weights, init_a, ownership, weighted_product
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FLoRA(Method):
    """`[s_1 B_1 ... s_K B_K] [p_1 A_1; ...; p_K A_K] = sum p_k s_k B_k A_k`, added to the base weight: nothing is lost.

    The next round starts from B = 0 and a new random A, drawn by seed and round and the same for all clients, so that slice j
    is common. Deviation: a client keeps nothing between its rounds. It therefore receives the whole sum so far and adds it to
    its initial base model; in the paper, each round's stack is sent to every registered client.
    """

    name = "flora"
    summary = "mean of products is added to the base weight, stacked; new random A, B zero"
    paper = "FLoRA, arXiv 2409.05976"
    traits = Traits(mixed_ranks=True, exact=Holds.ALWAYS, linear=Holds.NEVER, gauge_free=Holds.ALWAYS, stationary=Holds.ALWAYS)

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        layer = state.adapter.layers[name]
        fresh = init_a(layer.rank, layer, keys.generator(state.seed, "flora", state.round + 1, name))
        return layer.with_factors(fresh, torch.zeros_like(layer.B))

    def merge_base(self, state: ServerState, name: str, parts: Sequence[Part], layer: LoraLayer) -> LoraLayer | None:
        weights = client_weights(parts)[:, None] * ownership(parts, layer.rank)
        return add_to_base(state, name, weighted_product(parts, weights))
