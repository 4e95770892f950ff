"""LoRA-FAIR: averages with a corrected B (Bian et al., ICCV 2025, arXiv 2411.14961)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.errors import MethodError
from anyrank.messages.records import ServerState
from anyrank.methods.base import Holds, Method, Part, Traits, average_slices, empty_slices, slice_weights, weighted_product
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class LoRAFair(Method):
    """`A` and `B + D`, with `D = argmin 1 - cos(W, (B + D) A) + penalty * |D|_F^2`: means of A and B, W the mean of products.

    Mixed ranks are our extension: A, B and W are means slice by slice over owners, and slices without owners stay unchanged.
    Deviations: the norm is squared, so that the objective is smooth; the minimum is computed to rounding precision, whereas
    the paper runs SGD on the server.
    """

    name = "lora_fair"
    summary = "mean of A, mean of B corrected towards the mean of products, slice by slice over owners"
    paper = "LoRA-FAIR, arXiv 2411.14961"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.NEVER, gauge_free=Holds.NEVER, stationary=Holds.ALWAYS)
    by_owners = True
    rescale = "both"

    penalty: float = 0.01

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise MethodError(f"lora_fair: penalty: expected a number above 0, got {self.penalty}")

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        layer = state.adapter.layers[name]
        weights = slice_weights(parts, layer.rank)
        A, B = (factor / layer.scaling**0.5 for factor in average_slices(parts, weights, empty=layer))
        ideal = lowrank.stack([weighted_product(parts, weights), empty_slices(state, name, weights)])
        return layer.with_factors(A, corrected(A, B, ideal, self.penalty))


def corrected(A: Tensor, B: Tensor, ideal: lowrank.Product, penalty: float) -> Tensor:
    """`C = B + D` at the minimum of `1 - cos(W, C A) + penalty * |D|^2` that is nearest to the mean, `[out, R]`.

    From the factors alone: with `G = A A^T`, `P = W A^T`, `n = |C A|`, the gradient vanishes at `C = (a P + 2 penalty B)
    (b G + 2 penalty I)^-1` for `a = 1 / (|W| n)`, `b = cos / n^2`. In G's eigenbasis a follows from b by a quadratic
    equation, and bisection finds b. If the mean is zero, or points away from W, it stays unchanged.
    """
    g, Q = torch.linalg.eigh(A @ A.T)
    g, P, B, k = g.clamp_min(0), ideal.left @ (ideal.right @ A.T) @ Q, B @ Q, 2 * penalty
    p, q, t = (P * P).sum(dim=0), (P * B).sum(dim=0), (B * B).sum(dim=0)
    size, n = lowrank.norm(ideal), float((g * t).sum()) ** 0.5
    if size * n == 0 or q.sum() <= 0:
        return B @ Q.T

    def at(b: float) -> tuple[float, float]:
        """`a`, and `a |W| n - 1`, which is below 0 for small b and above 0 for large b."""
        d = (b * g + k) ** 2
        p2, q2, t2 = (float(x.sum()) for x in (p / d, q * (b * g - k) / d, g * t / d))
        root = (q2**2 + 4 * p2 * k * b * t2) ** 0.5
        a = (
            (q2 + root) / (2 * p2) if q2 > 0 else 2 * k * b * t2 / (root - q2)
        )  # two forms of the same root; this choice avoids cancellation
        return a, a * size * float((g * (a * a * p + 2 * a * k * q + k * k * t) / d).sum()) ** 0.5 - 1

    low = high = float(q.sum()) / (size * n**3)
    while at(low)[1] > 0:
        low /= 2
    while at(high)[1] < 0:
        high *= 2
    while low < (b := (low * high) ** 0.5) < high:
        low, high = (b, high) if at(b)[1] < 0 else (low, b)
    return ((at(low)[0] * P + k * B) / (low * g + k)) @ Q.T
