"""Linear algebra on products that are kept as factors: `M = sum_j w_j left_j right_j`, never formed.

Four ways to the singular triples, chosen by cost or by the caller (`algebra`), each tested against the dense computation,
singular cases included. With n inner columns:

* `qr`: both factors by QR, the core by SVD, all in float64. Exact to rounding; the only one that `auto` takes for float64.
* `gram`: through the factors' Gram matrices; for float32 factors (or narrower) as exact as they are, and a third of the cost.
* `randomized`: a block Krylov space from random vectors. Its cost grows with n, that of the others with n^2 to n^3.
* `auto`: the cheapest of them; where `randomized` does not reach rounding level, `gram`, and where that does not, `qr`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from anyrank import keys, subspace
from anyrank.adapter import LoraLayer
from anyrank.errors import MethodError, nearest

Algebra = Literal["auto", "qr", "gram", "randomized"]
ALGEBRAS: tuple[Algebra, ...] = ("auto", "qr", "gram", "randomized")
_EPS = torch.finfo(torch.float64).eps


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

    def stacked(self, room: Callable[[str, Tensor, tuple[int, int]], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`X` `[out, n]`, `w` `[n]` float64 and `Y` `[n, in]` with `M = X diag(w) Y`, X and Y in the working precision.

        `room(name, like, shape)` gives the memory for X and for Y.
        """
        (out, width), like = self.shape, self.terms[0].left.new_empty(0, dtype=self.dtype)
        X, Y = room("X", like, (out, self.slices)), room("Y", like, (self.slices, width))
        start = 0
        for term in self.terms:  # copied in place, so that no factor is held a second time in a wider type
            stop = start + len(term.weights)
            X[:, start:stop], Y[start:stop], start = term.left, term.right, stop
        return X, torch.cat([term.weights for term in self.terms]).to(X.device), Y


class SVD(NamedTuple):
    """`M = U @ diag(S) @ Vt`: `U` `[out, k]`, `S` `[k]` falling and positive, `Vt` `[k, in]`; `k` is M's numerical rank."""

    U: Tensor
    S: Tensor
    Vt: Tensor


@dataclass
class Work:
    """How the singular values of a piece of work were computed: which way, how often, and the largest backward error.

    `error` is relative to the norm of what was kept: the result is exact for a sum that differs by this much.
    """

    algebra: Algebra = "auto"
    paths: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    _rooms: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def room(self, name: str, like: Tensor, shape: tuple[int, int]) -> Tensor:
        """Memory for the stacked factors, the same for layer after layer: fresh pages cost more than what is put in them."""
        size = shape[0] * shape[1]
        held = self._rooms.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype or held.device != like.device:
            held = self._rooms[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)

    def leave(self) -> None:
        self._rooms.clear()

    def note(self, path: str, error: float) -> None:
        self.paths[path] = self.paths.get(path, 0) + 1
        self.error = max(self.error, error)


_WORK: ContextVar[Work | None] = ContextVar("anyrank_work", default=None)


@contextmanager
def using(algebra: str) -> Iterator[Work]:
    """Within it, `svd` takes this way, and what it did is written down. (As `numpy.errstate`: for this thread and task only.)

    >>> with using("gram") as work:
    ...     _ = svd(Product(torch.eye(3), torch.eye(3)))
    >>> work.paths
    {'gram': 1}
    """
    if algebra not in ALGEBRAS:
        raise MethodError(f"algebra '{algebra}': unknown; {nearest(algebra, ALGEBRAS)}")
    work = Work(algebra)
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


def _core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Ql, C, Qr` with `left @ right = Ql @ C @ Qr.T`, Ql, Qr with orthonormal columns, C no larger than that or `[n, n]`."""
    Ql, Rl = torch.linalg.qr(left)
    Qr, Rr = torch.linalg.qr(right.T)
    return Ql, Rl @ Rr.T, Qr


def svd(product: Product, rank: int | None = None) -> SVD:
    """The singular value decomposition of the product, its top `rank` triples (default: all that are not rounding).

    Float64 if a factor is, else float32. Signs are fixed: the entry of largest magnitude in each right singular vector is
    positive, so that equal inputs give equal factors. Singular values at rounding level are dropped: a zero product gives
    k = 0. The way is that of the enclosing `using(...)`, by default `auto`.
    """
    work = _WORK.get() or Work()
    full = min(*product.shape, product.slices)
    rank = full if rank is None else min(rank, full)
    path, found, error = "qr", None, torch.finfo(product.dtype).eps
    if rank and work.algebra != "qr":
        path, found, error = _by_subspace(product, rank, work)
    U, S, Vt = _by_qr(product, rank) if found is None else found
    work.note(path, error)
    if len(S) == 0:
        return SVD(U, S, Vt)
    peak = Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    sign = torch.where(peak < 0, -1.0, 1.0).to(Vt)
    return SVD(U.mul_(sign), S, Vt.mul_(sign[:, None]))


def _by_qr(product: Product, rank: int) -> SVD:
    left, right = product.left, product.right
    Ql, core, Qr = _core(left, right)
    u, S, vt = torch.linalg.svd(core, full_matrices=False)
    # A sum that cancels leaves noise of the factors' size, not of S[0]: the floor looks at both. The size is taken slice by
    # slice, so that it does not depend on how a slice's scale is divided between its two factors.
    size = float(torch.linalg.vector_norm(left, dim=0) @ torch.linalg.vector_norm(right, dim=1))
    largest = max(product.shape) * float(S.max() if len(S) else 0.0)
    keep = min(rank, int((_EPS * max(largest, 4 * size) < S).sum()))
    U, S, Vt = Ql @ u[:, :keep], S[:keep], vt[:keep] @ Qr.T
    return SVD(U.to(product.dtype), S.to(product.dtype), Vt.to(product.dtype))


def _by_subspace(product: Product, rank: int, work: Work) -> tuple[str, SVD | None, float]:
    """The way taken, its triples (`None`: leave it to QR) and their backward error."""
    eps, algebra = torch.finfo(product.dtype).eps, work.algebra
    cost = subspace.cost(*product.shape, product.slices, rank)
    path = min(cost, key=cost.__getitem__) if algebra == "auto" else algebra
    if path == "qr" or (algebra == "auto" and product.dtype == torch.float64):
        return "qr", None, eps
    X, w, Y = product.stacked(work.room)
    found = None
    if path == "randomized":
        found = subspace.krylov(X, w, Y, rank, keys.generator(0, "krylov", *product.shape, product.slices))
        if algebra == "auto" and found and found.error > subspace.tolerance(X.dtype):
            path = "gram"
    if path == "gram":
        found = subspace.gram(X, w, Y, rank)
    if found is None or (algebra == "auto" and found.error > subspace.tolerance(X.dtype)):
        return "qr", None, eps
    return path, SVD(found.U, found.S.to(X.dtype), found.Vt), found.error


def spectrum(product: Product) -> Tensor:
    """All singular values of the product that the factors can carry, `[min(out, in, n)]`, falling; zeros included."""
    return torch.linalg.svdvals(_core(product.left, product.right)[1])


def norm(product: Product) -> float:
    """Frobenius norm of the product."""
    return float(torch.linalg.matrix_norm(_core(product.left, product.right)[1]))


def inner(a: Product, b: Product) -> float:
    """Frobenius inner product `sum(M_a * M_b)` of two products of one shape."""
    return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())


def difference(a: Product, b: Product) -> Product:
    """`M_a - M_b`, as factors."""
    return Product.of([*a.terms, *(term._replace(weights=-term.weights) for term in b.terms)])
