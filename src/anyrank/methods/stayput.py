"""stayput: an average of steps, in which a slice that a client lacks counts as unchanged (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.algebra import lowrank
from anyrank.errors import MethodError
from anyrank.messages.records import Client, ClientUpdate, Download, Scaling, ServerState
from anyrank.methods.base import (
    Holds,
    Method,
    Part,
    Split,
    Traits,
    Unsettled,
    client_weights,
    frozen_rest,
    ownership,
    reordered,
    slice_order,
    top_of,
    weighted_product,
    widened,
)
from anyrank.methods.registry import register

_BEFORE = "before"  # the key in `state.extra` of the global update one round ago


@register
@dataclass(frozen=True)
class StayPut(Method):
    """`W = sum_j [G_j + sum over owners of w_kj (P_kj - G_j)]`, `w_kj = p_k / coverage_j^tau`, then the SVD share.

    `G_j` is the server's slice, `P_kj` the client's; `tau = 1` is raFLoRA. `true_point`: a client also receives the slices that
    it does not train, frozen. `rotate`: a client trains r random slices, different ones each round. `momentum`: this share of
    the last step is added again, also in a round without training. `server_rank`: the server's rank, if above its clients'
    ranks, limited by each layer's shape.
    """

    name = "stayput"
    summary = "mean of steps of products, slice by slice, a missing slice is no step; SVD share"
    paper = "this project"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.NEVER, gauge_free=Holds.EQUAL, stationary=Holds.ALWAYS)

    by_layer = True  # apart from the layers, it keeps the update one round ago, layer by layer

    tau: float = 0.0
    true_point: bool = True
    rotate: bool = True
    momentum: float = 0.0
    server_rank: int = 0
    split: Split = "singular-in-b"

    def __post_init__(self) -> None:
        if not (0 <= self.tau <= 1 and 0 <= self.momentum < 1 and self.server_rank >= 0):
            got = f"{self.tau}, {self.momentum} and {self.server_rank}"
            raise MethodError(f"stayput: expected tau from 0 to 1, momentum from 0 to below 1, server_rank from 0, got {got}")

    rescale = property(lambda self: "both" if self.split == "balanced" else "B")

    def lone_weight(self, share: float) -> float:
        return share ** (1 - self.tau)

    def init(self, adapter: Adapter, scaling: Scaling, seed: int) -> ServerState:
        return super().init(widened(adapter, self.server_rank, scaling, seed), scaling, seed)

    def dispatch(self, state: ServerState, client: Client) -> Download:
        ranks = {name: client.rank_of(name) for name in state.adapter.layers}
        order = {name: slice_order(state, name, client.name, rank, self.rotate) for name, rank in ranks.items()}
        seen = reordered(state, order)
        slices = {name: (*order[name], *range(len(order[name]), rank))[:rank] for name, rank in ranks.items()}
        merged = frozen_rest(seen, ranks) if self.true_point else None
        return replace(super().dispatch(seen, client), slices=slices, merged=merged)

    def share(self, state: ServerState, client: Client) -> Adapter:
        return super().dispatch(state, client).adapter

    def outside_runs(self) -> StayPut:
        return replace(self, rotate=False)  # shares are the first slices

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = super().aggregate(state, updates)
        return replace(after, extra={_BEFORE: replace(state.adapter, tensors={})}) if self.momentum and updates else after

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> Unsettled:
        held, before = state.adapter.layers[name], state.extra.get(_BEFORE)
        order = torch.tensor([slice_order(state, name, part.client, part.layer.rank, self.rotate) for part in parts])
        sent = client_weights(parts)[:, None] * ownership(parts, held.rank)  # p_k, own slices first, [K, R]
        coverage = torch.zeros(held.rank, dtype=sent.dtype).index_add(0, order.flatten(), sent.flatten())
        shared = coverage.clamp_min(torch.finfo(sent.dtype).tiny) ** self.tau
        terms = [weighted_product(parts, sent / shared[order]), lowrank.of_layer(held, 1 - coverage / shared)]
        if before:  # one more step along the last: W - W before
            terms += [lowrank.of_layer(held, self.momentum), lowrank.of_layer(before.layers[name], -self.momentum)]
        return top_of(state, name, lowrank.stack(terms), self.split)
