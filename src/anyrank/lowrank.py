"""Linear algebra on products that are kept as factors: `M = left @ right`, never formed.

Every function works in float64 on the factors and costs `O((out + in) * n^2 + n^3)` for `n` inner columns, whatever
the size of `M`. Each is tested against the dense computation, singular cases included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyrank.adapter import LoraLayer

_EPS = torch.finfo(torch.float64).eps


class Product(NamedTuple):
    """`M = left @ right`, as factors: `left` `[out, n]`, `right` `[n, in]`, both float64."""

    left: Tensor
    right: Tensor


class SVD(NamedTuple):
    """`M = U @ diag(S) @ Vt`: `U` `[out, k]`, `S` `[k]` falling and positive, `Vt` `[k, in]`; `k` is M's numerical rank."""

    U: Tensor
    S: Tensor
    Vt: Tensor


def of_layer(layer: LoraLayer, weights: Tensor | float = 1.0) -> Product:
    """What `layer` applies, `scaling * B @ diag(weights) @ A`, with one weight for all slices or one for each `[rank]`."""
    return Product(layer.B.double() * (layer.scaling * weights), layer.A.double())


def stack(products: Sequence[Product]) -> Product:
    """The sum of `products`, exactly: their factors side by side."""
    return Product(torch.cat([p.left for p in products], dim=1), torch.cat([p.right for p in products], dim=0))


def _core(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """`Ql, C, Qr` with `M = Ql @ C @ Qr.T`, Ql and Qr with orthonormal columns and C no larger than M or `[n, n]`."""
    Ql, Rl = torch.linalg.qr(product.left)
    Qr, Rr = torch.linalg.qr(product.right.T)
    return Ql, Rl @ Rr.T, Qr


def svd(product: Product, rank: int | None = None) -> SVD:
    """The singular value decomposition of the product, its top `rank` triples (default: all that are not rounding).

    Signs are fixed: the entry of largest magnitude in each right singular vector is positive, so that equal inputs give
    equal factors. Singular values at rounding level (`max(out, in) * eps * S[0]`, or 4 eps of the
    slices' summed norms) are dropped: a zero product gives k = 0.
    """
    Ql, core, Qr = _core(product)
    u, S, vt = torch.linalg.svd(core, full_matrices=False)
    # A sum that cancels leaves noise of the factors' size, not of S[0]: the floor looks at both. The size is taken slice by
    # slice, so that it does not depend on how a slice's scale is divided between its two factors.
    size = float(torch.linalg.vector_norm(product.left, dim=0) @ torch.linalg.vector_norm(product.right, dim=1))
    largest = max(product.left.shape[0], product.right.shape[1]) * float(S.max() if len(S) else 0.0)
    keep = int((_EPS * max(largest, 4 * size) < S).sum())
    keep = keep if rank is None else min(keep, rank)
    U, S, Vt = Ql @ u[:, :keep], S[:keep], vt[:keep] @ Qr.T
    if keep == 0:
        return SVD(U, S, Vt)
    peak = Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    sign = torch.where(peak < 0, -1.0, 1.0).to(Vt)
    return SVD(U * sign, S, Vt * sign[:, None])


def spectrum(product: Product) -> Tensor:
    """All singular values of the product that the factors can carry, `[min(out, in, n)]`, falling; zeros included."""
    return torch.linalg.svdvals(_core(product)[1])


def norm(product: Product) -> float:
    """Frobenius norm of the product."""
    return float(torch.linalg.matrix_norm(_core(product)[1]))


def inner(a: Product, b: Product) -> float:
    """Frobenius inner product `sum(M_a * M_b)` of two products of one shape."""
    return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())


def difference(a: Product, b: Product) -> Product:
    """`M_a - M_b`, as factors."""
    return stack([a, Product(-b.left, b.right)])
