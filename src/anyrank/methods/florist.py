"""FLoRIST: products are averaged, singular values are kept up to an energy threshold (Ramesh & Dass 2025, arXiv 2506.09199)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.errors import MethodError
from anyrank.messages.records import ServerState
from anyrank.methods.base import (
    Holds,
    Method,
    Part,
    Split,
    Traits,
    Unsettled,
    client_weights,
    from_svd,
    ownership,
    weighted_product,
)
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FLoRIST(Method):
    """`W = sum p_k s_k B_k A_k`, cut to the fewest singular values with `sum_{i <= p} S_i^2 >= energy * sum S_i^2`.

    Deviations: the paper gives all clients the p remaining slices; here a client of rank r gets the top r of them, and slices
    past p start again from B = 0, so that clients keep their ranks. At most the server's rank is kept.
    """

    name = "florist"
    summary = "mean of products, cut at a share of their energy, SVD share"
    paper = "FLoRIST, arXiv 2506.09199"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.NEVER, gauge_free=Holds.ALWAYS, stationary=Holds.NEVER)

    energy: float = 0.99
    split: Split = "singular-in-b"

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise MethodError(f"florist: energy: expected a share above 0 and at most 1, got {self.energy}")

    @property
    def rescale(self):
        return "both" if self.split == "balanced" else "B"

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> Unsettled:
        weights = client_weights(parts)[:, None] * ownership(parts, state.rank_of(name))
        return Unsettled(weighted_product(parts, weights), None, lambda svd: self._cut(state, name, svd))

    def _cut(self, state: ServerState, name: str, svd: lowrank.SVD) -> LoraLayer:
        U, S, Vt = svd
        short = torch.cumsum(S**2, dim=0) < self.energy * (S**2).sum()  # true while the energy is not yet enough
        kept = min(len(S), int(short.sum()) + 1, state.rank_of(name))
        return from_svd(state, name, lowrank.SVD(U[:, :kept], S[:kept], Vt[:kept]), self.split)
