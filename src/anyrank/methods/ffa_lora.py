"""FFA-LoRA: A frozen at its random start, only B trained and averaged (Sun et al., ICLR 2024, arXiv 2403.12313, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from anyrank import keys
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import MethodError
from anyrank.messages.records import Scaling, ServerState
from anyrank.messages.spooled import rebuilt
from anyrank.methods.base import Holds, Method, Part, Traits, init_a, mean_b, slice_weights
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FFALoRA(Method):
    """`B = sum p_k B_k` over a common, frozen `A_0`: `mean(B_k) A_0 = mean(B_k A_0)`, so with equal ranks nothing is lost.

    Half the trained numbers and half the upload; A_0 comes from the run seed and is never sent. Mixed ranks (our extension):
    client k trains the first r_k columns, and each column is averaged over the clients that have it, weighted `s_k q_kj`.
    """

    name = "ffa_lora"
    summary = "A frozen and common; mean of B, slice by slice over owners"
    paper = "FFA-LoRA, arXiv 2403.12313"
    traits = Traits(mixed_ranks=True, exact=Holds.EQUAL, linear=Holds.ALWAYS, gauge_free=Holds.NEVER, stationary=Holds.ALWAYS)
    by_owners = True
    weights = staticmethod(slice_weights)
    train = frozenset({"B"})
    send = frozenset({"B"})

    init_a: Literal["kaiming", "orthonormal", "gaussian"] = "kaiming"

    def init(self, adapter: Adapter, scaling: Scaling, seed: int) -> ServerState:
        layers = rebuilt(adapter, lambda name: self._start(name, adapter.layers[name], seed))
        return super().init(replace(adapter, layers=layers), scaling, seed)

    def _start(self, name: str, layer: LoraLayer, seed: int) -> LoraLayer:
        draw = keys.generator(seed, "ffa-lora", name)
        rank, width = layer.A.shape
        if self.init_a == "kaiming":
            A = init_a(rank, layer, draw)
        elif self.init_a == "gaussian":
            A = torch.randn(rank, width, generator=draw, dtype=torch.float64) / rank
        elif rank > width:
            raise MethodError(f"ffa_lora: orthonormal A needs a rank of at most {width} in layer {name}, got {rank}")
        else:
            A = torch.linalg.qr(torch.randn(width, rank, generator=draw, dtype=torch.float64))[0].T
        return layer.with_factors(A, torch.zeros_like(layer.B))

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        layer = state.adapter.layers[name]
        return layer.with_factors(layer.A, mean_b(state, name, parts))
