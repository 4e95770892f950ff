"""The leading singular triples of `M = X diag(w) Y` for tall, thin factors: two ways that never orthogonalise them.

`gram` works on the two Gram matrices of the factors (`[n, n]` for n inner columns), `krylov` on products of M with a thin
block of vectors. Both run in the factors' own precision where that costs nothing, and both measure what they return:
`error` is the backward error `|M V - U S|_F / |S|`, so the triples are exact for a sum that is this close to M.

Error of `gram`, relative to the size `(sum_j (w_j |x_j| |y_j|)^2)^(1/2)`: the products of float32 factors are summed in
float64 over row blocks and the core is solved in float64, which leaves `eps` (float32: 1.2e-7) times a small constant in
`U S Vt`. The Gram matrix squares the condition number, so single directions below `sqrt(eps)` of the size (float32: 3e-4)
are not told apart by it: those are settled by Rayleigh and Ritz on the factors themselves, whenever the measured error or the
lengths of the vectors say that it matters. Singular values at rounding level, `4 eps` of that size, are dropped.

Every function takes one product, X `[m, n]`, w `[n]`, Y `[n, p]`, or many of one shape with a leading dimension before each.
What is decided by numbers (whether a Cholesky factor exists, what has to be mended) is decided for each product by itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anyrank import keys

_BLOCK, _PANEL, _EXTRA, _MAX_BLOCKS = 2048, 96, 8, 12
_THIN = 12  # columns of a block of `_lanczos`: few, so that the space is small where it suffices
_F64 = torch.float64


class Triples(NamedTuple):
    """`U` `[..., m, k]`, `S` `[..., k]` falling (float64), `Vt` `[..., k, p]`, and `error` `[...]`, the backward error relative
    to `|S|`. What is at rounding level is zero, in S and in the vectors; `error` is infinite where squares leave the number
    range, and the rest of that product means nothing.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    error: Tensor


def tolerance(dtype: torch.dtype) -> float:
    """The backward error that counts as rounding, `24 eps`: 2.9e-6 for float32."""
    return 24 * torch.finfo(dtype).eps


def cost(m: int, p: int, n: int, rank: int) -> dict[str, float]:
    """What each way costs, in float32 multiply-adds of a large matrix product: measured rates of QR, eigh and thin products."""
    thin, left, right = min(n, rank + _EXTRA), min(m, n), min(p, n)
    blocks, sides = min(left, right) // thin, m + p
    core = 3.5 * n**3 + 38 * thin * n**2 if _has_room(n, rank) else 18 * n**3
    return {
        "qr": 3e7 + 400 * sides * n + 12 * n**2 * sum(side for side in (m, p) if side > n) + 20 * n * left * right,
        "gram": 4e7 + 0.75 * sides * n**2 + 2.6 * sides * n * rank + core,
        # Six blocks settle the spectra of averaged adapters; with room for fewer there is no subspace to search in.
        "randomized": 1e8 + 34 * sides * n * thin if blocks > 6 else math.inf,
    }


def gram(X: Tensor, w: Tensor, Y: Tensor, rank: int) -> Triples:
    """The top `rank` triples by the eigenvectors of `L^T Gx L`, `Gy = L L^T`.

    `X` `[..., m, n]`, `w` `[..., n]` float64, `Y` `[..., n, p]`. With the slices balanced (each factor's slice has norm
    `sqrt(w_j |x_j| |y_j|)`), so that rounding is measured against what a slice contributes: `U S = X L Z` and
    `V S^2 = Y^T Gx L Z`, in which nothing is inverted; so singular cases need no care.
    """
    on_left, on_right, values, floor, fits = _solve_core(X, w, Y, rank)
    S = _above(values[..., :rank].sqrt(), floor)
    U = X @ _over(on_left[..., :rank], S[..., None, :]).to(X.dtype)
    Vt = _over(on_right[..., :rank], S[..., None, :] ** 2).to(X.dtype).mT @ Y
    error = _residual(X, w, Y, U, S, Vt)
    wrong = fits & ((error > tolerance(X.dtype)) | ~_unit(U.mT, S) | ~_unit(Vt, S))
    found = Triples(U, S, Vt, error.masked_fill(~fits, math.inf))
    if wrong.any():
        mended = ritz(X[wrong], w[wrong], Y[wrong], X[wrong] @ on_left[wrong].to(X.dtype), rank, floor[wrong])
        for part, other in zip(found, mended, strict=True):
            part[wrong] = other
    return found


def _solve_core(X: Tensor, w: Tensor, Y: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`L Z` and `Gx L Z` `[..., n, k]` in terms of the slices as they came, the top eigenvalues `S^2`, the rounding level, and
    whether squares stay in the number range; k is `rank` and a few more.
    """
    gx, gy = _gram(X), _gram(Y.mT)  # gy: its upper half is enough
    _mirror(gx)
    x, y = _diagonal(gx).sqrt(), _diagonal(gy).sqrt()
    fits = _squares_fit(X, x) & _squares_fit(Y.mT, y)
    if not fits.all():
        gx, gy, x, y = _zeroed(~fits, gx, gy, x, y)
    size = w.abs() * x * y
    root = size.sqrt()
    on_x, on_y = _over(root, x), w.sign() * _over(root, y)
    gx.mul_(on_x[..., None]).mul_(on_x[..., None, :])
    gy.mul_(on_y[..., None]).mul_(on_y[..., None, :])
    _diagonal(gy).add_(1e-13 * _diagonal(gy).sum(dim=-1, keepdim=True) + torch.finfo(_F64).tiny)
    L = _root(gy).mT
    del gy  # n x n, and the eigenvectors need its room
    floor, pairs = _floor(X.dtype, size), _all if X.dtype == _F64 else _leading
    values, Z = pairs(_core(gx, L), rank, floor)
    LZ = L @ Z
    return on_x[..., None] * LZ, on_y[..., None] * (gx @ LZ), values.clamp_min(0), floor, fits


def _root(G: Tensor) -> Tensor:
    """An upper triangular R with `R^T R = G`, for a G of which the upper half is given and that may be singular."""
    R, failed = torch.linalg.cholesky_ex(G, upper=True)
    failed = failed > 0
    if failed.any():
        values, vectors = _eigh(G[failed])
        R[failed] = torch.linalg.qr(values.clamp_min(0).sqrt()[..., None] * vectors.mT)[1]
    return R


def _core(G: Tensor, L: Tensor) -> Tensor:
    """The upper half of `L^T G L` for a symmetric G and a lower triangular L, panel by panel without L's zeros."""
    F, core = torch.empty_like(G), torch.empty_like(G)
    panels = [(start, start + _PANEL) for start in range(0, L.shape[-1], _PANEL)]
    for start, stop in panels:  # F = G L; its lower half is enough for what follows
        torch.matmul(G[..., start:, start:], L[..., start:, start:stop], out=F[..., start:, start:stop])
    for start, stop in panels:
        torch.matmul(F[..., start:, :stop].mT, L[..., start:, start:stop], out=core[..., :stop, start:stop])
    return core


# --- the leading eigenvectors of the core ----------------------------------------------------------------------------


def _all(upper: Tensor, rank: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs, `rank` and a few more, of the symmetric matrices with these upper halves; values falling."""
    most = min(rank + _EXTRA, upper.shape[-1])
    values, vectors = _eigh(upper)
    return values[..., -most:].flip(-1), vectors[..., -most:].flip(-1)


def _leading(upper: Tensor, rank: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """As `_all`, from a Krylov space where there is room for one, and only for those matrices that it settles."""
    if not _has_room(upper.shape[-1], rank):
        return _all(upper, rank, floor)
    values, vectors, settled = _lanczos(_mirror(upper), rank, floor)
    if not settled.all():
        values[~settled], vectors[~settled] = _all(upper[~settled], rank, floor)
    return values, vectors


def _has_room(n: int, rank: int) -> bool:
    """Whether a Krylov space for `rank` pairs is so much smaller than `[n, n]` that it saves time."""
    return n >= max(300, 5 * (rank + _EXTRA))


def _lanczos(A: Tensor, rank: int, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenpairs of symmetric `A` `[..., n, n]` from a block Krylov space, and whether they are settled, `[...]`.

    The space grows, to n / 2 at most, until what `A Z` has outside it changes `U S` by less than float32's rounding.
    """
    n, most, goal = A.shape[-1], rank + _EXTRA, torch.finfo(torch.float32).eps / 2
    V, T = A.new_empty(*A.shape[:-2], n // 2 + _THIN, n), A.new_zeros(*A.shape[:-2], n // 2, n // 2)
    V[..., :_THIN, :] = torch.linalg.qr(A @ _noise("core", A))[0].mT
    check = 2.1 * most
    for size in range(_THIN, n // 2 + 1, _THIN):
        basis = V[..., :size, :]
        new = A @ basis[..., -_THIN:, :].mT
        along = basis @ new
        T[..., :size, size - _THIN : size] = along
        new, R = torch.linalg.qr(new - basis.mT @ along)
        if size >= check:
            values, inner = _all(T[..., :size, :size], rank, floor)
            S = _above(values[..., :rank].clamp_min(0).sqrt(), floor)
            missed = torch.linalg.matrix_norm(_over(R @ inner[..., -_THIN:, :rank], S[..., None, :])) / _size(S)
            check = 1.2 * size
            if (missed <= goal).all() or not (missed <= 1e4 * goal).any():
                break
        # At right angles once more, now that its columns have length one: where the space is exhausted they are noise.
        V[..., size : size + _THIN, :] = torch.linalg.qr(new - basis.mT @ (basis @ new))[0].mT
    least = torch.maximum(values[..., rank - 1], floor**2)
    return values, V[..., : inner.shape[-2], :].mT @ inner, (missed <= goal) & _nothing_left(A, basis, least)


def _nothing_left(A: Tensor, basis: Tensor, least: Tensor) -> Tensor:
    """Whether the rows of `basis` are orthonormal and A has no eigenvalue of size `least` at right angles to them, `[...]`.

    A block finds no more copies of one eigenvalue than it has columns. The other ones show in vectors of another draw.
    """

    def outside(x: Tensor) -> Tensor:
        return x - basis.mT @ (basis @ x)

    x = outside(_noise("left", A))
    skew = torch.linalg.matrix_norm(basis @ x) / torch.linalg.matrix_norm(x)
    for _ in range(3):
        length = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        x = outside(A @ _over(x, length))
    return (skew < 1e-10) & (torch.linalg.vector_norm(x, dim=-2).amax(dim=-1) < least / 2)


def _noise(name: str, like: Tensor) -> Tensor:
    """`[n, _THIN]` standard normal numbers, the same for every matrix of `like`'s size."""
    n = like.shape[-1]
    return torch.randn(n, _THIN, generator=keys.generator(0, name, n), dtype=like.dtype).to(like.device)


# --- products with vectors only --------------------------------------------------------------------------------------


def krylov(X: Tensor, w: Tensor, Y: Tensor, rank: int) -> Triples:
    """The top `rank` triples in the block Krylov space of `M M^T` from random vectors (Musco and Musco 2015).

    One block costs two products with M and two with its transpose, thin ones; blocks are added until the error is at
    rounding level, twelve at most. Each new block shows the error of the last: what `M V` has outside the space so far.
    """
    (m, n), p, weights = X.shape[-2:], Y.shape[-1], w.to(X.dtype)[..., None, :]
    x, y = torch.linalg.vector_norm(X, dim=-2), torch.linalg.vector_norm(Y, dim=-1)
    fits = _squares_fit(X, x) & _squares_fit(Y.mT, y)
    if not fits.all():
        X, Y, x, y = _zeroed(~fits, X, Y, x, y)
    floor = _floor(X.dtype, w.abs() * x.double() * y.double())
    thin = min(rank + _EXTRA, m, p, n)
    start = torch.randn(p, thin, generator=keys.generator(0, "krylov", m, p, n), dtype=_F64).to(X)
    basis, projected = torch.linalg.qr(X @ (weights.mT * (Y @ start)))[0], X.new_empty(*X.shape[:-2], 0, p)
    while True:
        last = ((basis[..., -thin:].mT @ X) * weights) @ Y
        projected = torch.cat([projected, last], dim=-2)
        u, S = _small(projected, rank, floor)
        V, R = torch.linalg.qr(last.mT)  # orthonormal first: what is small in the block would drown in what is large
        new = X @ (weights.mT * (Y @ V))
        for _ in range(2):
            new = new - basis @ (basis.mT @ new)
        # M times the right vectors lies in the space so far but for what its last block contributes.
        outside = new.double() @ (R.double() @ _over(u[..., -thin:, :], S[..., None, :]))
        missed = torch.linalg.matrix_norm(outside) / _size(S)
        if (missed <= tolerance(X.dtype)).all() or basis.shape[-1] >= thin * min(_MAX_BLOCKS, min(m, p, n) // thin):
            found = _assemble(basis, u, S, projected)
            error = torch.maximum(missed, _residual(X, w, Y, found.U, S, found.Vt))
            return found._replace(error=error.masked_fill(~fits, math.inf))
        basis = torch.cat([basis, torch.linalg.qr(new)[0]], dim=-1)


def ritz(X: Tensor, w: Tensor, Y: Tensor, W: Tensor, rank: int, floor: Tensor) -> Triples:
    """The best triples whose left vectors lie in the span of `W` `[..., m, k]`: the SVD of `Q Q^T M`, Q a basis of it."""
    length = torch.linalg.vector_norm(W, dim=-2, keepdim=True)
    basis = torch.linalg.qr(_over(W, length).double())[0].to(X.dtype)
    projected = ((basis.mT @ X) * w.to(X.dtype)[..., None, :]) @ Y
    u, S = _small(projected, rank, floor)
    found = _assemble(basis, u, S, projected)
    return found._replace(error=_residual(X, w, Y, found.U, S, found.Vt))


def _small(K: Tensor, rank: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values (float64) of a wide `K` `[..., k, p]`: its top `rank`, those below `floor` as zero."""
    values, vectors = _eigh(_gram(K.mT, _F64))
    S = _above(values.flip(-1)[..., :rank].clamp_min(0).sqrt(), floor)
    return vectors.flip(-1)[..., :rank] * (S > 0)[..., None, :], S


def _assemble(basis: Tensor, u: Tensor, S: Tensor, projected: Tensor) -> Triples:
    return Triples(basis @ u.to(basis.dtype), S, _over(u, S[..., None, :]).to(basis.dtype).mT @ projected, S.sum(dim=-1))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _floor(dtype: torch.dtype, sizes: Tensor) -> Tensor:
    """Rounding level of a sum of slices with norms `sizes` `[..., n]`: a sum that cancels leaves noise of their size."""
    return 4 * torch.finfo(dtype).eps * torch.linalg.vector_norm(sizes.double(), dim=-1)


def _squares_fit(X: Tensor, norms: Tensor) -> Tensor:
    """Whether the norms of X's columns, which are sums of squares, neither overflow nor lose what is very small, `[...]`."""
    fit, low = torch.isfinite(norms), norms < 1e4 * math.sqrt(torch.finfo(X.dtype).tiny)
    if low.any():
        fit = fit & ~(low & X.any(dim=-2))
    return fit.all(dim=-1)


def _zeroed(which: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors, zero for the products that `which` `[...]` names: what is no number there would end the work on all."""
    return [tensor.masked_fill(which.reshape(*which.shape, *[1] * (tensor.ndim - which.ndim)), 0) for tensor in tensors]


def _size(S: Tensor) -> Tensor:
    return torch.linalg.vector_norm(S, dim=-1).clamp_min(torch.finfo(_F64).tiny)


def _gram(X: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The upper half of `X^T X` `[..., n, n]` in float64: products in `dtype` (default: X's), summed over blocks of rows."""
    n = X.shape[-1]
    total = torch.zeros(*X.shape[:-2], n, n, dtype=_F64, device=X.device)
    for rows in X.split(_BLOCK, dim=-2):
        block = rows.to(dtype or X.dtype)
        for start in range(0, n, _PANEL):
            total[..., start : start + _PANEL, start:] += block[..., start : start + _PANEL].mT @ block[..., start:]
    return total


def _diagonal(G: Tensor) -> Tensor:
    return G.diagonal(dim1=-2, dim2=-1)


def _mirror(upper: Tensor) -> Tensor:
    """The symmetric matrices with these upper halves, in their memory."""
    for start in range(0, upper.shape[-1], _PANEL):
        stop = start + _PANEL
        corner = upper[..., start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        upper[..., stop:, start:stop] = upper[..., start:stop, stop:].mT
    return upper


def _eigh(upper: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of the symmetric matrices with these upper halves, by one thread.

    Its many small steps wait for each other: at a few hundred columns a second thread costs more time than it saves.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigh(upper, UPLO="U")
    finally:
        torch.set_num_threads(threads)


def _residual(X: Tensor, w: Tensor, Y: Tensor, U: Tensor, S: Tensor, Vt: Tensor) -> Tensor:
    """An estimate of `|M V - U S|_F` and of `|M^T U - V S|_F`, the larger one over `|S|`, from one random sum of each.

    With random signs g, `|R g|^2` has the mean `|R|_F^2`. The signs are fixed, so equal inputs give equal figures.
    """
    k = S.shape[-1]
    signs = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(k), dtype=torch.int64)
    g, weights = (2 * signs - 1).to(X)[:, None], w.to(X.dtype)[..., None]
    scaled = S.to(X.dtype)[..., None] * g
    right = X @ (weights * (Y @ (Vt.mT @ g))) - U @ scaled
    left = Y.mT @ (weights * (X.mT @ (U @ g))) - Vt.mT @ scaled
    return torch.maximum(torch.linalg.matrix_norm(right), torch.linalg.matrix_norm(left)) / _size(S)


def _unit(rows: Tensor, S: Tensor) -> Tensor:
    """Whether all rows with an S have length one, to a thousandth: vectors that come from rounding do not. `[...]`"""
    return (((torch.linalg.vector_norm(rows, dim=-1) - 1).abs() < 1e-3) | (S == 0)).all(dim=-1)


def _above(S: Tensor, floor: Tensor) -> Tensor:
    """`S` `[..., k]`, and zero where it is at `floor` or below."""
    return torch.where(floor[..., None] < S, S, 0.0)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and zero where b is."""
    return torch.where(b > 0, a / b, 0.0)
