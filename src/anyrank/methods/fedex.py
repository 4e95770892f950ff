"""FedEx-LoRA: the error of averaging the factors is added to the base model (Singhal et al. 2024, arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.messages.records import ServerState
from anyrank.methods.base import Holds, Part, Traits, add_to_base, client_weights, ownership, weighted_product
from anyrank.methods.fedavg import FedAvg
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FedEx(FedAvg):
    """FedAvg's factors, and the residual `sum p_k s_k B_k A_k - s B A` of their product added to the base weight: exact.

    The residual is kept as factors. It is computed against the stored factors, including their rounding. Deviation: weights are
    by examples; the authors' code gives all clients the same weight.
    """

    name = "fedex"
    summary = "mean of A, mean of B; the residual of their product is added to the base weight"
    paper = "FedEx-LoRA, arXiv 2410.09432"
    traits = Traits(mixed_ranks=False, exact=Holds.EQUAL, linear=Holds.NEVER, gauge_free=Holds.EQUAL, stationary=Holds.EQUAL)
    weights = None  # the residual depends on the uploads too

    def merge_base(self, state: ServerState, name: str, parts: Sequence[Part], layer: LoraLayer) -> LoraLayer | None:
        weights = client_weights(parts)[:, None] * ownership(parts, layer.rank)
        residual = lowrank.difference(weighted_product(parts, weights), lowrank.of_layer(layer))
        return add_to_base(state, name, residual)
