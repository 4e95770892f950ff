"""One LoRA layer: its factors, its scaling, and its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anyrank.errors import AdapterError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_KINDS = ("linear", "conv2d", "embedding")


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One LoRA layer: the effective weight is `W0 + scaling * B @ A` (Hu et al. 2021, section 4.1).

    `A` `[rank, in]`, `B` `[out, rank]`, one floating dtype. A Conv2d layer is held as `in = channels * height * width`
    of its `kernel`; an Embedding layer as `in = number of embeddings`, `out = embedding size`.

    >>> layer = LoraLayer(A=torch.ones(1, 3), B=torch.ones(2, 1), scaling=2.0)
    >>> layer.rank, layer.delta().shape
    (1, torch.Size([2, 3]))
    """

    A: Tensor
    B: Tensor
    scaling: float
    kind: str = "linear"
    kernel: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("A", "B"):
            factor = torch.as_tensor(getattr(self, name))
            object.__setattr__(self, name, factor)
            if factor.ndim != 2 or 0 in factor.shape or factor.dtype not in _FLOATS or factor.layout is not torch.strided:
                raise AdapterError(
                    f"{name}: expected a two-dimensional floating tensor with no empty side, "
                    f"got {factor.dtype} of shape {tuple(factor.shape)}"
                )
        if self.A.shape[0] != self.B.shape[1] or self.A.dtype != self.B.dtype:
            raise AdapterError(
                f"A [rank, in] and B [out, rank] must share rank and dtype, got A {self.A.dtype} "
                f"{tuple(self.A.shape)} and B {self.B.dtype} {tuple(self.B.shape)}"
            )
        object.__setattr__(self, "scaling", float(self.scaling))
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise AdapterError(f"scaling: expected a positive number, got {self.scaling}")
        if self.kind not in _KINDS:
            raise AdapterError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the change it applies."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """The change of the weight, `scaling * B @ A`, `[out, in]`, dense. For looking at small layers and for tests."""
        return self.scaling * (self.B @ self.A)

    def with_factors(self, A: Tensor, B: Tensor, scaling: float | None = None) -> LoraLayer:
        """The same kind of layer with other factors (and, if given, another scaling), in this layer's dtype."""
        scaling = self.scaling if scaling is None else scaling
        return LoraLayer(A.to(self.A.dtype), B.to(self.B.dtype), scaling, self.kind, self.kernel)


def finite(tensor: Tensor, where: str, name: str) -> Tensor:
    """`tensor`, if all its numbers are."""
    # The sum is NaN or infinite where any entry is, and the quickest pass; large entries may also overflow it, so there the
    # extremes decide. An outline ("meta") has no entries.
    known = tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta"
    if known and not math.isfinite(tensor.sum()) and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise AdapterError(f"{where}, {name}: contains NaN or infinite values; the training that made it diverged")
    return tensor


def overflow(layer: LoraLayer) -> str:
    """What of a layer its own number type cannot hold, in words: a factor, or the change that it applies; else empty.

    The change is not formed: its norm is `scaling * sqrt(tr(B^T B A A^T))`, and no entry of it is larger. By the product of
    the factors' norms, which is no smaller, one look at each factor is enough for all layers that anybody trains.
    """
    largest = torch.finfo(layer.A.dtype).max
    norms = {name: _norm(getattr(layer, name)) for name in "AB"}
    for name, norm in norms.items():
        if not norm <= largest:
            return f"factor {name}"
    bound = layer.scaling * norms["A"] * norms["B"]
    return "" if bound <= largest or _change(layer) <= largest else "the change scaling * B @ A"


def _norm(factor: Tensor) -> float:
    wide = torch.float64 if factor.dtype == torch.float64 else torch.float32
    norm = float(torch.linalg.vector_norm(factor, dtype=wide))
    if math.isfinite(norm) or wide == torch.float64:
        return norm
    return float(torch.linalg.vector_norm(factor, dtype=torch.float64))  # squares may overflow where their numbers do not


def _change(layer: LoraLayer) -> float:
    """The norm of the change, or infinity where float64 cannot hold what it is computed from."""
    A, B = layer.A.double(), layer.B.double()
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return layer.scaling * math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.inf
