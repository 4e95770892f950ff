"""FedSVD: B averaged over a common A that each round's SVD refreshes (Lee et al., NeurIPS 2025, arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyrank import keys
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.messages.records import Scaling, ServerState
from anyrank.messages.spooled import rebuilt
from anyrank.methods.base import Holds, Method, Part, Traits, Unsettled, init_a, mean_b, pad
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FedSVD(Method):
    """FFA-LoRA's `B A` with the mean B, then `U S V^T` of it: the next round trains `B = U S / s` over the frozen `A = V^T`.

    A is orthonormal from the start (rows that the SVD leaves empty are drawn orthogonal to the others). It changes, so it is
    sent to the clients; they upload only B. Mixed ranks are our extension: client k trains the first r_k columns, and each
    column is averaged over the clients that have it.
    """

    name = "fedsvd"
    summary = "A frozen and common; mean of B, slice by slice over owners; then new A and B by SVD"
    paper = "FedSVD, arXiv 2505.12805"
    traits = Traits(mixed_ranks=True, exact=Holds.EQUAL, linear=Holds.NEVER, gauge_free=Holds.NEVER, stationary=Holds.ALWAYS)
    by_owners = True
    train = frozenset({"B"})

    def init(self, adapter: Adapter, scaling: Scaling, seed: int) -> ServerState:
        def start(name: str) -> LoraLayer:
            layer = adapter.layers[name]
            return _complete(layer, layer.A[:0], layer.B[:, :0], seed, name, 0)

        layers = rebuilt(adapter, start)
        return super().init(replace(adapter, layers=layers), scaling, seed)

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> Unsettled:
        layer = state.adapter.layers[name]
        product = lowrank.Product(mean_b(state, name, parts), layer.A.double())
        return Unsettled(product, None, lambda svd: _complete(layer, svd.Vt, svd.U * svd.S, state.seed, name, state.round + 1))


def _complete(like: LoraLayer, A: Tensor, B: Tensor, seed: int, name: str, round: int) -> LoraLayer:
    """A layer of `like`'s rank from orthonormal rows of A; missing rows are drawn orthogonal to them, with B zero.

    Past the layer's width, no orthogonal direction is left: the last rows are then drawn as in PEFT.
    """
    (rank, width), known = like.A.shape, A.shape[0]
    draw = keys.generator(seed, "fedsvd", round, name)
    fresh = init_a(rank, like, draw).double()[: min(rank, width) - known]
    basis = torch.linalg.qr(torch.cat([A.double(), fresh]).T)[0].T  # the first rows are A's, up to a sign
    A = torch.cat([A.double(), basis[known:]])
    B = torch.cat([B.double(), torch.zeros(B.shape[0], len(A) - known, dtype=torch.float64)], dim=1)
    return pad(like.with_factors(A, B), rank, seed, "fresh", round, name)
