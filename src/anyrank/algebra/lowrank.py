"""Linear algebra on products that are kept as factors: `M = sum_j w_j left_j right_j`, never formed.

Four ways to the singular triples, chosen by cost or by the caller (`algebra`), each tested against the dense computation,
singular cases included. With n inner columns:

* `qr`: both factors by QR, the core by SVD, all in float64. Exact to rounding; the only one that `auto` takes for float64.
* `gram`: through the factors' Gram matrices; for float32 factors (or narrower) as exact as they are, and a third of the cost.
* `randomized`: a block Krylov space from random vectors. Its cost grows with n, that of the others with n^2 to n^3.
* `auto`: the cheapest of them; where `randomized` does not reach rounding level, `gram`, and where that does not, `qr`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import subspace
from anyrank.algebra.names import Algebra, check_algebra
from anyrank.algebra.subspace import Triples

_EPS, _CPU = torch.finfo(torch.float64).eps, torch.device("cpu")


class Term(NamedTuple):
    """`left @ diag(weights) @ right`: `left` `[out, n]` and `right` `[n, in]` as they are stored, `weights` `[n]` float64."""

    left: Tensor
    weights: Tensor
    right: Tensor


class Product:
    """`M = left @ right`, as factors: a sum of terms that stay in the precision, and the memory, they came in.

    `left` `[out, n]` (weights included) and `right` `[n, in]` are put together in float64 when they are asked for.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        ones = torch.ones(left.shape[1], dtype=torch.float64, device=left.device)
        self.terms: tuple[Term, ...] = (Term(left, ones, right),)

    @classmethod
    def of(cls, terms: Sequence[Term]) -> Product:
        product = cls.__new__(cls)
        product.terms = tuple(terms)
        return product

    @property
    def left(self) -> Tensor:
        return torch.cat([term.left.double() * term.weights for term in self.terms], dim=1)

    @property
    def right(self) -> Tensor:
        return torch.cat([term.right.double() for term in self.terms], dim=0)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the product."""
        return self.terms[0].left.shape[0], self.terms[0].right.shape[1]

    @property
    def slices(self) -> int:
        """The number n of inner columns."""
        return sum(len(term.weights) for term in self.terms)

    @property
    def dtype(self) -> torch.dtype:
        """The precision to work in: float64 if any factor has it, else float32."""
        wide = any(torch.float64 in (term.left.dtype, term.right.dtype) for term in self.terms)
        return torch.float64 if wide else torch.float32


class SVD(NamedTuple):
    """`M = U @ diag(S) @ Vt`: `U` `[out, k]`, `S` `[k]` falling and positive, `Vt` `[k, in]`; `k` is M's numerical rank."""

    U: Tensor
    S: Tensor
    Vt: Tensor


@dataclass
class Work:
    """How the singular values of a piece of work were computed: which way, how often, and the largest backward error.

    `error` is relative to the norm of what was kept: the result is exact for a sum that differs by this much. Where several
    products are asked for at once, as many of one shape as have stacked factors of `batch_bytes` are solved side by side on
    `device`, one by one if that is 0.
    """

    algebra: Algebra = "auto"
    device: torch.device = _CPU
    batch_bytes: int = 0
    paths: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    _rooms: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def room(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Memory for the stacked factors, the same for layer after layer: fresh pages cost more than what is put in them."""
        size = math.prod(shape)
        held = self._rooms.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._rooms[name] = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)

    def leave(self) -> None:
        self._rooms.clear()

    def note(self, path: str, error: float) -> None:
        self.paths[path] = self.paths.get(path, 0) + 1
        self.error = max(self.error, error)


_WORK: ContextVar[Work | None] = ContextVar("anyrank_work", default=None)


@contextmanager
def using(algebra: str, device: torch.device = _CPU, batch_bytes: int = 0) -> Iterator[Work]:
    """Within it, `svd` takes this way, and what it did is written down. (As `numpy.errstate`: for this thread and task only.)

    `device` and `batch_bytes`: see `Work`. The device has to know float64.

    >>> with using("gram") as work:
    ...     _ = svd(Product(torch.eye(3), torch.eye(3)))
    >>> work.paths
    {'gram': 1}
    """
    check_algebra(algebra)
    work = Work(algebra, device, batch_bytes)
    token = _WORK.set(work)
    try:
        yield work
    finally:
        _WORK.reset(token)
        work.leave()


def of_layer(layer: LoraLayer, weights: Tensor | float = 1.0) -> Product:
    """What `layer` applies, `scaling * B @ diag(weights) @ A`, with one weight for all slices or one for each `[rank]`.

    Slices of weight zero are left out.
    """
    w = layer.scaling * torch.as_tensor(weights, dtype=torch.float64, device=layer.A.device).expand(layer.rank)
    if w.all():
        return Product.of([Term(layer.B, w, layer.A)])
    some = w.nonzero().squeeze(1)
    return Product.of([Term(layer.B[:, some], w[some], layer.A[some])])


def stack(products: Sequence[Product]) -> Product:
    """The sum of `products`, exactly: their factors side by side."""
    return Product.of([term for product in products for term in product.terms])


def svd(product: Product, rank: int | None = None) -> SVD:
    """The singular value decomposition of the product, its top `rank` triples (default: all that are not rounding).

    Float64 if a factor is, else float32. Signs are fixed: the entry of largest magnitude in each right singular vector is
    positive, so that equal inputs give equal factors. Singular values at rounding level are dropped: a zero product gives
    k = 0. The way is that of the enclosing `using(...)`, by default `auto`. Raises `OverflowError` where float64 is too narrow.
    """
    return svd_all([product], [rank])[0]


def svd_all(products: Sequence[Product], ranks: Sequence[int | None]) -> list[SVD]:
    """`svd` of each product; those of one shape, number type and rank side by side, as the enclosing `using(...)` says.

    The results lie on the CPU. How many were solved side by side changes them by rounding.
    """
    work = _WORK.get() or Work()
    alike: dict[tuple[tuple[int, int], int, torch.dtype, int], list[int]] = {}
    for i, (product, rank) in enumerate(zip(products, ranks, strict=True)):
        full = min(*product.shape, product.slices)
        kept = full if rank is None else min(rank, full)
        alike.setdefault((product.shape, product.slices, product.dtype, kept), []).append(i)
    found: dict[int, SVD] = {}
    for (shape, slices, dtype, kept), which in alike.items():
        together = max(1, work.batch_bytes // max(1, sum(shape) * slices * dtype.itemsize))
        for start in range(0, len(which), together):
            some = which[start : start + together]
            found |= zip(some, _solve([products[i] for i in some], kept, work), strict=True)
    return [found[i] for i in range(len(products))]


def _solve(products: Sequence[Product], rank: int, work: Work) -> list[SVD]:
    """The top `rank` triples of products of one shape. What one way leaves unsettled goes to the next, product by product."""
    *ways, last = _ways(products[0], rank, work.algebra)
    enough = subspace.tolerance(products[0].dtype) if work.algebra == "auto" else sys.float_info.max
    found: list[SVD | None] = [None] * len(products)
    for way in (*ways, last):
        rest = [i for i, done in enumerate(found) if done is None]
        if not rest:
            break
        triples = _WAYS[way]([products[i] for i in rest], rank, work)
        for i, one, error in zip(rest, _cut(triples), triples.error.reshape(-1).tolist(), strict=True):
            if error <= enough or way == last:
                found[i] = one
                work.note(way, error)
    return found


def _ways(product: Product, rank: int, algebra: Algebra) -> tuple[str, ...]:
    """The ways to try, one after another. QR settles everything."""
    if algebra == "qr" or rank == 0 or (algebra == "auto" and product.dtype == torch.float64):
        return ("qr",)
    if algebra != "auto":
        return (algebra, "qr")
    cost = subspace.cost(*product.shape, product.slices, rank)
    order = ("randomized", "gram", "qr")
    return order[order.index(min(cost, key=cost.__getitem__)) :]


def _cut(found: Triples) -> list[SVD]:
    """The triples of each product, with fixed signs and without what is at rounding level."""
    sign = torch.where(_peaks(found.Vt) < 0, -1.0, 1.0).to(found.Vt)
    U, Vt = found.U.mul_(sign[..., None, :]).cpu(), found.Vt.mul_(sign[..., None]).cpu()
    S, kept = found.S.to(U).cpu(), (found.S > 0).sum(dim=-1).reshape(-1).tolist()
    if U.ndim == 2:
        U, S, Vt = U[None], S[None], Vt[None]
    return [SVD(u[:, :k], s[:k], vt[:k]) for u, s, vt, k in zip(U, S, Vt, kept, strict=True)]


def _peaks(rows: Tensor) -> Tensor:
    """The entry of largest magnitude in each row, the first one of several."""
    high, low = rows.amax(dim=-1), rows.amin(dim=-1)
    if (high == -low).any():
        return rows.gather(-1, rows.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    return torch.where(high > -low, high, low)


# --- the ways --------------------------------------------------------------------------------------------------------


def _by_qr(products: Sequence[Product], rank: int, work: Work) -> Triples:
    left = _beside([product.left.to(work.device) for product in products])
    right = _beside([product.right.to(work.device) for product in products])
    (Ql, Rl), (Qr, Rr) = _reduced(left), _reduced(right.mT)
    u, S, vt = torch.linalg.svd(Rl @ Rr.mT, full_matrices=False)
    # A sum that cancels leaves noise of the factors' size, not of S[0]: the floor looks at both. The size is taken slice by
    # slice, so that it does not depend on how a slice's scale is divided between its two factors.
    size = (torch.linalg.vector_norm(left, dim=-2) * torch.linalg.vector_norm(right, dim=-1)).sum(dim=-1)
    largest = max(products[0].shape) * S[..., :1].sum(dim=-1)
    floor = _EPS * torch.maximum(largest, 4 * size)
    if not torch.isfinite(floor).all():
        raise OverflowError("a product of factors is too large for float64")
    u, S, vt, dtype = u[..., :rank], S[..., :rank], vt[..., :rank, :], products[0].dtype
    U, Vt = u if Ql is None else Ql @ u, vt if Qr is None else vt @ Qr.mT
    S = torch.where(floor[..., None] < S, S, 0.0)
    return Triples(U.to(dtype), S, Vt.to(dtype), torch.full_like(floor, torch.finfo(dtype).eps))


def _reduced(factor: Tensor) -> tuple[Tensor | None, Tensor]:
    """`Q` and `R` of a tall factor; of one that is no taller than wide itself, with no Q: there is nothing to reduce."""
    return torch.linalg.qr(factor) if factor.shape[-2] > factor.shape[-1] else (None, factor)


def _by_gram(products: Sequence[Product], rank: int, work: Work) -> Triples:
    return subspace.gram(*_stacked(products, work), rank)


def _by_krylov(products: Sequence[Product], rank: int, work: Work) -> Triples:
    return subspace.krylov(*_stacked(products, work), rank)


def _stacked(products: Sequence[Product], work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """`X` `[..., out, n]`, `w` `[..., n]` float64 and `Y` `[..., n, in]` with `M = X diag(w) Y` for each product.

    X and Y are in the working precision, on the device, in memory that is used again and again.
    """
    first, count = products[0], len(products)
    (out, width), n = first.shape, first.slices
    X = work.room("X", first.dtype, (count, out, n))
    Y = work.room("Y", first.dtype, (count, n, width))
    for x, y, product in zip(X, Y, products, strict=True):
        _put([term.left for term in product.terms], 1, x)
        _put([term.right for term in product.terms], 0, y)
    w = _beside([torch.cat([term.weights for term in product.terms]).to(work.device) for product in products])
    return (X, w, Y) if count > 1 else (X[0], w, Y[0])


def _put(factors: list[Tensor], dim: int, room: Tensor) -> None:
    """`factors` side by side into `room`; where that is on their device, none is held a second time in a wider type."""
    if room.device == factors[0].device:
        torch.cat(factors, dim, out=room)
    else:
        room.copy_(torch.cat(factors, dim))


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    """Several tensors with a leading dimension, one as it is: the dimension would cost it time."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0]


_WAYS: dict[str, Callable[[Sequence[Product], int, Work], Triples]] = {
    "qr": _by_qr,
    "gram": _by_gram,
    "randomized": _by_krylov,
}


def spectrum(product: Product) -> Tensor:
    """All singular values of the product that the factors can carry, `[min(out, in, n)]`, falling; zeros included."""
    return torch.linalg.svdvals(_core(product))


def norm(product: Product) -> float:
    """Frobenius norm of the product."""
    return float(torch.linalg.matrix_norm(_core(product)))


def _core(product: Product) -> Tensor:
    """A matrix with the product's singular values and no side longer than n."""
    left, right = product.left, product.right.mT
    left, right = (torch.linalg.qr(f, mode="r")[1] if f.shape[0] > f.shape[1] else f for f in (left, right))
    return left @ right.mT


def inner(a: Product, b: Product) -> float:
    """Frobenius inner product `sum(M_a * M_b)` of two products of one shape."""
    return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())


def difference(a: Product, b: Product) -> Product:
    """`M_a - M_b`, as factors."""
    return Product.of([*a.terms, *(term._replace(weights=-term.weights) for term in b.terms)])
