"""The leading singular triples of `M = X diag(w) Y` for tall, thin factors: two ways that never orthogonalise them.

`gram` works on the two Gram matrices of the factors (`[n, n]` for n inner columns), `krylov` on products of M with a thin
block of vectors. Both run in the factors' own precision where that costs nothing, and both measure what they return:
`error` is the backward error `|M V - U S|_F / |S|`, so the triples are exact for a sum that is this close to M.

Error of `gram`, relative to the size `(sum_j (w_j |x_j| |y_j|)^2)^(1/2)`: the products of float32 factors are summed in
float64 over row blocks and the core is solved in float64, which leaves `eps` (float32: 1.2e-7) times a small constant in
`U S Vt`. The Gram matrix squares the condition number, so single directions below `sqrt(eps)` of the size (float32: 3e-4)
are not told apart by it: those are settled by Rayleigh and Ritz on the factors themselves, whenever the measured error or the
lengths of the vectors say that it matters. Singular values at rounding level, `4 eps` of that size, are dropped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK, _PANEL, _EXTRA, _MAX_BLOCKS = 2048, 96, 8, 12
_F64 = torch.float64


class Triples(NamedTuple):
    """`U` `[m, k]`, `S` `[k]` falling (float64), `Vt` `[k, p]`, and `error`, the backward error relative to `|S|`."""

    U: Tensor
    S: Tensor
    Vt: Tensor
    error: float


def tolerance(dtype: torch.dtype) -> float:
    """The backward error that counts as rounding, `24 eps`: 2.9e-6 for float32."""
    return 24 * torch.finfo(dtype).eps


def cost(m: int, p: int, n: int, rank: int) -> dict[str, float]:
    """What each way costs, in float32 multiply-adds of a large matrix product: measured rates of QR, eigh and thin products."""
    thin, left, right = min(n, rank + _EXTRA), min(m, n), min(p, n)
    blocks = min(left, right) // thin
    return {
        "qr": 5e6 + 16 * n * (m * left + p * right) + 120 * n * left * right,
        "gram": 3e7 + 1.25 * (m + p) * n**2 + 4 * (m + p) * n * rank + 30 * n**3,
        # Six blocks settle the spectra of averaged adapters; with room for fewer there is no subspace to search in.
        "randomized": 1e8 + 39 * (m + p) * n * thin if blocks > 6 else math.inf,
    }


def gram(X: Tensor, w: Tensor, Y: Tensor, rank: int) -> Triples | None:
    """The top `rank` triples by the eigenvectors of `L^T Gx L`, `Gy = L L^T`; `None` where squares leave the number range.

    `X` `[m, n]`, `w` `[n]` float64, `Y` `[n, p]`. With the slices balanced (each factor's slice has norm
    `sqrt(w_j |x_j| |y_j|)`), so that rounding is measured against what a slice contributes: `U S = X L Z` and
    `V S^2 = Y^T Gx L Z`, in which nothing is inverted; so singular cases need no care.
    """
    solved = _solve_core(X, w, Y, rank + _EXTRA)
    if solved is None:
        return None
    on_left, on_right, values, floor = solved
    keep = min(rank, int((floor < values.sqrt()).sum()))
    S = values[:keep].sqrt()
    U, Vt = X @ (on_left[:, :keep] / S).to(X.dtype), (on_right[:, :keep] / S**2).T.to(X.dtype) @ Y
    found = Triples(U, S, Vt, _residual(X, w, Y, U, S, Vt))
    if found.error <= tolerance(X.dtype) and _unit(U.T) and _unit(Vt):
        return found
    return ritz(X, w, Y, X @ on_left.to(X.dtype), rank, floor)


def _solve_core(X: Tensor, w: Tensor, Y: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """`L Z` and `Gx L Z` `[n, most]` in terms of the slices as they came, the top eigenvalues `S^2`, the rounding level."""
    gx, gy = _gram(X), _gram(Y.T)  # gy: its upper half is enough
    gx = gx.triu_().add_(gx.triu(1).T)
    x, y = gx.diagonal().sqrt(), gy.diagonal().sqrt()
    if not (_squares_fit(X, x) and _squares_fit(Y.T, y)):
        return None
    root = (w.abs() * x * y).sqrt()
    on_x, on_y = _over(root, x), w.sign() * _over(root, y)
    gx.mul_(on_x[:, None]).mul_(on_x)
    gy.mul_(on_y[:, None]).mul_(on_y).diagonal().add_(1e-13 * gy.diagonal().sum() + torch.finfo(_F64).tiny)
    R, failed = torch.linalg.cholesky_ex(gy, upper=True)
    if failed:
        values, vectors = _eigh(gy)
        R = torch.linalg.qr(values.clamp_min(0).sqrt()[:, None] * vectors.T)[1]
    L = R.T
    del gy  # n x n, and eigh needs its room
    values, Z = _eigh(_core(gx, L))
    values, LZ = values.flip(0)[:most].clamp_min(0), L @ Z[:, -most:].flip(1)
    return on_x[:, None] * LZ, on_y[:, None] * (gx @ LZ), values, _floor(X.dtype, root**2)


def _core(G: Tensor, L: Tensor) -> Tensor:
    """The upper half of `L^T G L` for a symmetric G and a lower triangular L, panel by panel without L's zeros."""
    F, core = torch.empty_like(G), torch.zeros_like(G)
    panels = [(start, start + _PANEL) for start in range(0, len(L), _PANEL)]
    for start, stop in panels:  # F = G L; its lower half is enough for what follows
        torch.matmul(G[start:, start:], L[start:, start:stop], out=F[start:, start:stop])
    for start, stop in panels:
        torch.matmul(F[start:, :stop].T, L[start:, start:stop], out=core[:stop, start:stop])
    return core


def krylov(X: Tensor, w: Tensor, Y: Tensor, rank: int, generator: torch.Generator) -> Triples | None:
    """The top `rank` triples in the block Krylov space of `M M^T` from random vectors (Musco and Musco 2015).

    One block costs two products with M and two with its transpose, thin ones; blocks are added until the error is at
    rounding level, twelve at most. Each new block shows the error of the last: what `M V` has outside the space so far.
    `None` where squares leave the number range.
    """
    weights, (m, n), p = w.to(X.dtype), X.shape, Y.shape[1]
    x, y = torch.linalg.vector_norm(X, dim=0), torch.linalg.vector_norm(Y, dim=1)
    if not (_squares_fit(X, x) and _squares_fit(Y.T, y)):
        return None
    floor = _floor(X.dtype, w.abs() * x.double() * y.double())
    thin = min(rank + _EXTRA, m, p, n)
    start = torch.randn(p, thin, generator=generator, dtype=_F64).to(X)
    basis, projected = torch.linalg.qr(X @ (weights[:, None] * (Y @ start)))[0], X.new_empty(0, p)
    while True:
        last = ((basis[:, -thin:].T @ X) * weights) @ Y
        projected = torch.cat([projected, last])
        u, S = _small(projected, rank, floor)
        V, R = torch.linalg.qr(last.T)  # orthonormal first: what is small in the block would drown in what is large
        new = X @ (weights[:, None] * (Y @ V))
        for _ in range(2):
            new = new - basis @ (basis.T @ new)
        # M times the right vectors lies in the space so far but for what its last block contributes.
        missed = float(torch.linalg.matrix_norm(new.double() @ (R.double() @ (u[-thin:] / S)))) / _size(S)
        if missed <= tolerance(X.dtype) or basis.shape[1] >= thin * min(_MAX_BLOCKS, min(m, p, n) // thin):
            found = _assemble(basis, u, S, projected)
            return found._replace(error=max(missed, _residual(X, w, Y, found.U, S, found.Vt)))
        basis = torch.cat([basis, torch.linalg.qr(new)[0]], dim=1)


def ritz(X: Tensor, w: Tensor, Y: Tensor, W: Tensor, rank: int, floor: float) -> Triples:
    """The best triples whose left vectors lie in the span of `W` `[m, k]`: the SVD of `Q Q^T M`, Q its orthonormal basis."""
    length = torch.linalg.vector_norm(W, dim=0)
    basis = torch.linalg.qr((W * _over(torch.ones_like(length), length)).double())[0].to(X.dtype)
    projected = ((basis.T @ X) * w.to(X.dtype)) @ Y
    u, S = _small(projected, rank, floor)
    found = _assemble(basis, u, S, projected)
    return found._replace(error=_residual(X, w, Y, found.U, S, found.Vt))


def _small(K: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values (float64) of a wide `K` `[k, p]`: its top `rank` of those above `floor`."""
    values, vectors = _eigh(_gram(K.T, _F64))
    S = values.flip(0)[:rank].clamp_min(0).sqrt()
    keep = int((floor < S).sum())
    return vectors.flip(1)[:, :keep], S[:keep]


def _assemble(basis: Tensor, u: Tensor, S: Tensor, projected: Tensor) -> Triples:
    return Triples(basis @ u.to(basis.dtype), S, (u / S).T.to(basis.dtype) @ projected, 0.0)


def _floor(dtype: torch.dtype, sizes: Tensor) -> float:
    """Rounding level of a sum of slices with norms `sizes` `[n]`: a sum that cancels leaves noise of their size."""
    return 4 * torch.finfo(dtype).eps * float(torch.linalg.vector_norm(sizes.double()))


def _squares_fit(X: Tensor, norms: Tensor) -> bool:
    """Whether the norms of X's columns, which are sums of squares, neither overflow nor lose what is very small."""
    low = norms < 1e4 * math.sqrt(torch.finfo(X.dtype).tiny)
    return bool(torch.isfinite(norms).all()) and not (low.any() and X[:, low].any())


def _size(S: Tensor) -> float:
    return max(float(torch.linalg.vector_norm(S)), torch.finfo(_F64).tiny)


def _gram(X: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The upper half of `X^T X` `[n, n]` in float64: products in `dtype` (default: X's own), summed over blocks of rows."""
    n = X.shape[1]
    total = torch.zeros(n, n, dtype=_F64, device=X.device)
    for rows in X.split(_BLOCK):
        block = rows.to(dtype or X.dtype)
        for start in range(0, n, _PANEL):
            total[start : start + _PANEL, start:] += block[:, start : start + _PANEL].T @ block[:, start:]
    return total


def _eigh(upper: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of the symmetric matrix with this upper half, by one thread.

    Its many small steps wait for each other: at a few hundred columns a second thread costs more time than it saves.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigh(upper, UPLO="U")
    finally:
        torch.set_num_threads(threads)


def _residual(X: Tensor, w: Tensor, Y: Tensor, U: Tensor, S: Tensor, Vt: Tensor) -> float:
    """An estimate of `|M V - U S|_F` and of `|M^T U - V S|_F`, the larger one over `|S|`, from one random sum of each.

    With random signs g, `|R g|^2` has the mean `|R|_F^2`. The signs are fixed, so equal inputs give equal figures.
    """
    signs = torch.randint(0, 2, (len(S),), generator=torch.Generator().manual_seed(len(S)), dtype=torch.int64)
    g, weights = (2 * signs - 1).to(X), w.to(X.dtype)
    scaled = S.to(X.dtype) * g
    right = X.mv(weights * Y.mv(Vt.T.mv(g))) - U.mv(scaled)
    left = Y.T.mv(weights * X.T.mv(U.mv(g))) - Vt.T.mv(scaled)
    largest = max(float(torch.linalg.vector_norm(right)), float(torch.linalg.vector_norm(left)))
    return largest / _size(S)


def _unit(rows: Tensor) -> bool:
    """Whether all rows have length one, to a thousandth: vectors that come from rounding do not."""
    return bool(((torch.linalg.vector_norm(rows, dim=1) - 1).abs() < 1e-3).all())


def _over(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and zero where b is."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))
