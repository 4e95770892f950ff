"""Steps of clients, and their geometry: norms and inner products of what uploads change, from factors alone.

A client's step is the change of its effective weight, `s' B' A' - s B A`, over all layers, and of its plain tensors. Norms and
inner products of it do not depend on how a product is written as factors, so that nobody gains by `(B G, G^-1 A)`.

Small steps. `s B' A'` and `s B A` are nearly equal, and the difference of their norms would have no digits left. The step is
written by the changes of the factors instead, which are exact: slice by slice `dB A' + B dA`, or `dB A + B' dA`, which is the
same matrix. The form with the smaller terms is taken: under `(g B, A / g)` the terms of one of them grow with g.

Memory. Factors are converted to float64 a part at a time (4 MB). Inner products are computed for two blocks of clients at a
time, of 1,024 columns and 256 MB of downloads each at most, or of one client. For layers of 4096 x 4096 and rank 64 that is
about 150 MB, however many clients there are, and two blocks of downloads, beside the uploads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ClientUpdate, Download, Job, factor_bytes
from anyrank.messages.spool import Spool
from anyrank.messages.spooled import shelved, spool_of

_COLUMNS = 1 << 10  # of the steps of a block of clients: its products with another block are 8 MB
_DOWNLOADS = 1 << 28  # bytes of the downloads of a block
_NUMBERS = 1 << 19  # float64 numbers of factors that are held at a time: 4 MB, and as much for each step of a sum


class Factors(NamedTuple):
    """A product `left @ right` in float64, whose factors are made part by part: `left(rows)` is `[rows, n]`, `right(columns)`
    is `[n, columns]`; `shape` is `(out, in)`."""

    left: Callable[[slice], Tensor]
    right: Callable[[slice], Tensor]
    n: int
    shape: tuple[int, int]


def norm(download: Download, trained: Adapter) -> float:
    """The norm of the step from `download` to `trained`: `tr((L^T L)(R R^T))` for the factors L, R of each layer's step."""
    squares = (square(layer, trained.layers[name]) for name, layer in download.adapter.layers.items())
    return total(squares, download, trained)


def square(before: LoraLayer, after: LoraLayer) -> float:
    """The squared norm of one layer's step."""
    step = [_change(before, after)]
    return float(_products(step, step).sum())


def total(squares: Iterable[float], download: Download, trained: Adapter) -> float:
    """The norm of the step whose layers have these `squares`."""
    square = sum(squares)
    square += sum(float(part @ part) for part in _moves(download.adapter, trained))
    return max(square, 0.0) ** 0.5 if square < float("inf") else float("inf")


def along(download: Download, trained: Adapter) -> list[float]:
    """The squared norm of the step to the point at share t of the way from `download` to `trained`, as a polynomial in t.

    Coefficients of `1, t, ..., t^4`: each factor moves on a line, `(B + t dB)(A + t dA) - B A = t (dB A + B dA) + t^2 dB dA`.
    Slices that pruning dropped are constant.
    """
    found = torch.zeros(5, dtype=torch.float64)
    for name, layer in download.adapter.layers.items():
        line, powers = _line(layer, trained.layers[name])
        products = _products([line], [line]).flatten()
        found.index_add_(0, (powers[:, None] + powers[None, :]).flatten(), products)
    found[2] += sum(float(part @ part) for part in _moves(download.adapter, trained))
    return found.tolist()


def gram(jobs: Sequence[Job], updates: Sequence[ClientUpdate], common: bool = False) -> Tensor:
    """`g_kl = <step_k, step_l>` `[K, K]` (float64): `tr((L_k^T L_l)(R_l R_k^T))` summed over layers, and over plain tensors.

    `common`: only of the slices that every client of `updates` was sent, layer by layer, where there are any. Rows and columns
    of a step that is too long for float64 are not finite.
    """
    by_name = {job.client.name: job for job in jobs}
    own = [by_name[update.client] for update in updates]
    kept = _common(own) if common else {}
    blocks = list(_blocks(updates))
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for last, block in enumerate(blocks):
        for others, products in _against(block, blocks[: last + 1], own, updates, kept):
            found[block, others] = products
            found[others, block] = products.T
    return found


def distances(gram: Tensor) -> Tensor:
    """Squared distances between steps `[K, K]`, from their Gram matrix; never below zero."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0.0)


def finite(gram: Tensor) -> list[int]:
    """The steps whose squared norm is a finite number. Of them, all distances are finite, too."""
    return (gram.diagonal() < torch.finfo(torch.float64).max / 16).nonzero().flatten().tolist()


# --- a step as factors -----------------------------------------------------------------------------------------------


def _change(before: LoraLayer, after: LoraLayer, kept: Sequence[int] | None = None) -> Factors:
    """`after - before` as a product of `2 r` columns, of all slices or of those at `kept`."""
    A, B, A1, B1 = before.A, before.B, after.A, after.B
    if after.rank < before.rank:  # pruned: what was dropped has become zero
        A1, B1 = torch.cat([A1, A[after.rank :]]), torch.cat([B1, torch.zeros_like(B[:, after.rank :])], dim=1)
    if kept is not None:
        A, B, A1, B1 = A[kept], B[:, kept], A1[kept], B1[:, kept]
    scaling, ratio = before.scaling, after.scaling / before.scaling
    early = _lengths(B, 0) * _lengths(A1, 1) <= _lengths(B1, 0) * _lengths(A, 1)  # which of the two forms, slice by slice

    def left(rows: slice) -> Tensor:
        start, end = B[rows].double(), ratio * B1[rows].double()  # times 1 is exact
        return torch.cat([end - start, torch.where(early, start, end)], dim=1).mul_(scaling)

    def right(columns: slice) -> Tensor:
        start, end = A[:, columns].double(), A1[:, columns].double()
        return torch.cat([torch.where(early[:, None], end, start), end - start])

    return Factors(left, right, 2 * A.shape[0], before.shape)


def _line(before: LoraLayer, after: LoraLayer) -> tuple[Factors, Tensor]:
    """The step on the way from `before` to `after`, and the power of the share that each of its columns is multiplied by."""
    r, scaling = after.rank, before.scaling

    def left(rows: slice) -> Tensor:
        start, end = before.B[rows].double(), after.B[rows].double()
        moved = end - start[:, :r]
        return torch.cat([moved, start[:, :r], moved, -start[:, r:]], dim=1).mul_(scaling)

    def right(columns: slice) -> Tensor:
        start, end = before.A[:, columns].double(), after.A[:, columns].double()
        moved = end - start[:r]
        return torch.cat([start[:r], moved, moved, start[r:]])

    powers = torch.tensor([1] * (2 * r) + [2] * r + [0] * (before.rank - r))
    return Factors(left, right, len(powers), before.shape), powers


def _lengths(factor: Tensor, dim: int) -> Tensor:
    """The norms of the columns (`dim` 0) or rows (`dim` 1), in float64."""
    step = max(1, _NUMBERS // factor.shape[1 - dim])
    parts = [torch.linalg.vector_norm(part, dim=dim, dtype=torch.float64) for part in factor.split(step, dim)]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)


def distance(start: Tensor, end: Tensor) -> float:
    """The norm of the change of one tensor, in float64."""
    norms = [float(torch.linalg.vector_norm(b.double() - a.double())) for a, b in _parts([start, end])]
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def _moves(before: Adapter, after: Adapter) -> Iterator[Tensor]:
    """The changes of the plain tensors, in parts."""
    for name, tensor in before.tensors.items():
        yield from (end.double() - start.double() for start, end in _parts([tensor, after.tensors[name]]))


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one shape, flat, in parts that are together not larger than is held at a time."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    step = max(1, _NUMBERS // len(flat))
    for start in range(0, flat[0].numel(), step):
        yield [each[start : start + step] for each in flat]


# --- inner products --------------------------------------------------------------------------------------------------


def _products(one: Sequence[Factors], other: Sequence[Factors]) -> Tensor:
    """`(L^T M) * (R S^T)`, `[n, m]`, entry by entry, for the factors L, R of `one` side by side, and M, S of `other`."""
    out, width = one[0].shape
    lefts = None if other is one else [each.left for each in other]
    rights = None if other is one else [each.right for each in other]
    columns = sum(each.n for each in one) + (0 if other is one else sum(each.n for each in other))
    step = max(1, _NUMBERS // columns)
    overlap = _overlap([each.left for each in one], lefts, out, step, dim=1)
    return overlap.mul_(_overlap([each.right for each in one], rights, width, step, dim=0)).cpu()


Make = Callable[[slice], Tensor]


def _overlap(one: Sequence[Make], other: Sequence[Make] | None, length: int, step: int, dim: int) -> Tensor:
    """The inner products of all columns (`dim` 1) or rows (`dim` 0) of `one` with those of `other`, or with themselves."""
    total: Tensor | None = None
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        x = _beside(one, part, dim)
        y = x if other is None else _beside(other, part, dim)
        total = x @ y.mT if total is None else total.addmm_(x, y.mT)
    assert total is not None  # no factor has an empty side
    return total


def _beside(makes: Sequence[Make], part: slice, dim: int) -> Tensor:
    """The parts side by side as rows: `[n, part]`."""
    made = makes[0](part) if len(makes) == 1 else torch.cat([make(part) for make in makes], dim=dim)
    return made.mT if dim else made


# --- blocks of clients -----------------------------------------------------------------------------------------------


Kept = Mapping[str, frozenset[int]]


def _against(
    block: slice, all_others: Sequence[slice], jobs: Sequence[Job], updates: Sequence[ClientUpdate], kept: Kept
) -> Iterator[tuple[slice, Tensor]]:
    """Each of the other blocks, with the inner products of this block's steps and theirs. The downloads of two are held."""
    sent = _downloads(jobs[block], updates[block])
    for others in all_others:
        own, theirs = updates[block], updates[others]
        # No name for the other block's downloads: it would keep them while the next ones are made.
        yield others, _between(sent, own, sent if others == block else _downloads(jobs[others], theirs), theirs, kept)


def _between(
    sent: Sequence[Download],
    updates: Sequence[ClientUpdate],
    others_sent: Sequence[Download],
    others: Sequence[ClientUpdate],
    kept: Kept,
) -> Tensor:
    """The inner products of one block's steps with another's."""
    same = others_sent is sent
    found = torch.zeros(len(updates), len(others), dtype=torch.float64)
    for name in sent[0].adapter.layers:
        one = _changes(name, sent, updates, kept)
        other = one if same else _changes(name, others_sent, others, kept)
        found += _summed(_products(one, other), one, other)
    for name in sent[0].adapter.tensors:
        ends = [update.adapter.tensors[name] for update in (*updates, *others)]
        starts = [download.adapter.tensors[name] for download in (*sent, *others_sent)]
        for parts in _parts([*ends, *starts]):
            moved = torch.stack(parts[: len(ends)]).double() - torch.stack(parts[len(ends) :]).double()
            found += (moved[: len(updates)] @ moved[len(updates) :].T).cpu()
    return found


def _changes(name: str, sent: Sequence[Download], updates: Sequence[ClientUpdate], kept: Kept) -> list[Factors]:
    changes = []
    for download, update in zip(sent, updates, strict=True):
        slices = download.slices[name]
        some = [i for i, j in enumerate(slices) if j in kept[name]] if kept and not kept[name].issuperset(slices) else None
        changes.append(_change(download.adapter.layers[name], update.adapter.layers[name], some))
    return changes


def _summed(products: Tensor, one: Sequence[Factors], other: Sequence[Factors]) -> Tensor:
    """The sum of each pair's block, `[K, L]`."""
    rows = torch.zeros(len(one), products.shape[1], dtype=torch.float64).index_add_(0, _owners(one), products)
    return torch.zeros(len(one), len(other), dtype=torch.float64).index_add_(1, _owners(other), rows)


def _owners(block: Sequence[Factors]) -> Tensor:
    """Which of the block each column belongs to."""
    return torch.repeat_interleave(torch.arange(len(block)), torch.tensor([each.n for each in block]))


def _blocks(updates: Sequence[ClientUpdate]) -> Iterator[slice]:
    """The clients in blocks, in their order."""
    start, columns, held = 0, 0, 0
    for k, update in enumerate(updates):
        wide = 2 * max(update.adapter.ranks.values(), default=0)
        size = factor_bytes(update.adapter, frozenset("AB"))
        if k > start and (columns + wide > _COLUMNS or held + size > _DOWNLOADS):
            yield slice(start, k)
            start, columns, held = k, 0, 0
        columns, held = columns + wide, held + size
    yield slice(start, len(updates))


def _downloads(jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> list[Download]:
    """The downloads of these jobs, which the caller alone holds. Where the updates lie in a spool, the adapters do so, too: in
    another one, which goes with them."""
    spool = spool_of(updates)
    spool = spool and spool.fresh()
    sent = []
    for job in jobs:
        sent.append(_shelved(job.download, spool) if spool else job.download)
        job.settle()
    return sent


def _shelved(download: Download, spool: Spool) -> Download:
    return replace(download, adapter=shelved(download.adapter, spool), merged=None)


def _common(jobs: Sequence[Job]) -> dict[str, frozenset[int]]:
    """The server's slices of each layer that all downloads have; of a layer with none, all of them."""
    slices: dict[str, list[frozenset[int]]] = {}
    for job in jobs:
        for name, sent in job.download.slices.items():
            slices.setdefault(name, []).append(frozenset(sent))
        job.settle()
    return {name: frozenset.intersection(*each) or frozenset.union(*each) for name, each in slices.items()}
