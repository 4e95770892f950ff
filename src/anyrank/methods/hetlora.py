"""HetLoRA: sparsity-weighted averages and rank self-pruning (Cho et al., EMNLP 2024, arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.errors import MethodError
from anyrank.messages.records import Client, ClientUpdate, Download, Pruning, ServerState
from anyrank.methods.base import Holds, Method, Part, Traits, average_layer, client_weights, ownership
from anyrank.methods.registry import register

_RANKS = "ranks"  # the key in `state.extra` under which each client's ranks are kept, in the order of the layers' names


@register
@dataclass(frozen=True)
class HetLoRA(Method):
    """Pad with zeros and average, weighted by `p_k = |s_k B_k A_k|_F / sum`, layer by layer; clients lower their own rank.

    Pruning: the local loss grows by `penalty * |B[:, tail]| * |A[tail]|`, the tail being the slices past `floor(gamma r)`; a
    client drops a layer's tail if that product is smaller after its training than before, but keeps at least `min_rank` slices.
    Deviations: weights and pruning are per layer, because ranks are; factors are averaged as `sqrt(s_k) A_k`, `sqrt(s_k) B_k`;
    if all products are zero, the weights are by examples.
    """

    name = "hetlora"
    summary = "factors padded with zeros, mean weighted by the products' norms; clients prune their ranks"
    paper = "HetLoRA, arXiv 2401.06432"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.NEVER, gauge_free=Holds.NEVER, stationary=Holds.EQUAL)
    rescale = "both"

    by_examples = False  # weights are the norms of products
    by_layer = True  # what it keeps beside the layers are ranks

    prune: bool = True
    gamma: float = 0.99
    penalty: float = 0.001
    min_rank: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.gamma <= 1 and self.penalty >= 0 and self.min_rank >= 1):
            raise MethodError(
                "hetlora: expected gamma above 0 and at most 1, penalty of at least 0 and min_rank of at least 1, got "
                f"{self.gamma}, {self.penalty} and {self.min_rank}"
            )

    @property
    def prunes(self) -> bool:
        return self.prune

    def dispatch(self, state: ServerState, client: Client) -> Download:
        if not self.prune:
            return super().dispatch(state, client)
        known = state.extra[_RANKS].tensors.get(client.name) if _RANKS in state.extra else None
        if known is not None:
            ranks = dict(zip(sorted(state.adapter.layers), known.tolist(), strict=True))
            client = replace(client, layer_ranks={name: min(rank, client.rank_of(name)) for name, rank in ranks.items()})
        pruning = Pruning(self.gamma, self.penalty, self.min_rank)
        return replace(super().dispatch(state, client), pruning=pruning)

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().aggregate(state, updates)
        if not (self.prune and updates):
            return after
        before = state.extra[_RANKS].tensors if _RANKS in state.extra else {}
        ranks = {u.client: torch.tensor([rank for _, rank in sorted(u.adapter.ranks.items())]) for u in updates}
        return replace(after, extra={**state.extra, _RANKS: Adapter({}, {**before, **ranks})})

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        norms = torch.tensor([lowrank.norm(lowrank.of_layer(part.layer)) for part in parts], dtype=torch.float64)
        weights = norms / norms.sum() if norms.any() else client_weights(parts)
        owned = ownership(parts, state.rank_of(name))
        return average_layer(state, name, parts, weights[:, None] * owned)
