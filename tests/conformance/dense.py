"""What each method computes, written plainly: dense float64 matrices and loops, straight from the page of definitions.

Nothing here uses the package. A layer is `Held(A, B, s)`, an upload is a layer with its example count `n`. A definition
gives, for one layer, the function `share(client, rank)`: the change of the weight `[out, in]` that a client of that rank
applies after the round, on top of what was in the base model when it trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Held(NamedTuple):
    """`A` `[r, in]`, `B` `[out, r]`, scaling `s`."""

    A: np.ndarray
    B: np.ndarray
    s: float


class Upload(NamedTuple):
    """A client's trained layer, and the examples that weigh it."""

    client: str
    layer: Held
    n: int


Share = Callable[[str, int], np.ndarray]
Definition = Callable[[Held, Sequence[Upload], Mapping[str, Any]], Share]


def slice_of(layer: Held, j: int) -> np.ndarray:
    """`s B[:, j] A[j, :]`."""
    return layer.s * np.outer(layer.B[:, j], layer.A[j])


def owners(uploads: Sequence[Upload], j: int) -> list[Upload]:
    """`C_j`: who has slice j (counted from 0)."""
    return [u for u in uploads if u.layer.A.shape[0] > j]


def examples(uploads: Sequence[Upload]) -> int:
    return sum(u.n for u in uploads)


def truncated(M: np.ndarray) -> Share:
    """The best approximation of M at the client's rank."""

    def share(client: str, rank: int) -> np.ndarray:
        U, S, Vt = np.linalg.svd(M)
        return sum((S[i] * np.outer(U[:, i], Vt[i]) for i in range(min(rank, len(S)))), np.zeros_like(M))

    return share


def first(slices: Sequence[np.ndarray]) -> Share:
    """The first r slices."""
    return lambda client, rank: sum(slices[:rank], np.zeros_like(slices[0]))


def fedavg(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """`A = sum p_k A_k`, `B = sum p_k B_k`, for clients of one rank, whose scaling is then one too."""
    p = {u.client: u.n / examples(uploads) for u in uploads}
    A = sum(p[u.client] * u.layer.A for u in uploads)
    B = sum(p[u.client] * u.layer.B for u in uploads)
    s = uploads[0].layer.s
    return first([slice_of(Held(A, B, s), j) for j in range(len(A))])


def factor_slices(held: Held, uploads: Sequence[Upload], keep: bool, over_all: bool) -> Share:
    """Slice by slice: the mean of `sqrt(s) A_k[j]` times the mean of `sqrt(s) B_k[:, j]`, over its owners or over all."""
    slices = []
    for j in range(len(held.A)):
        have = owners(uploads, j)
        if not have:
            slices.append(slice_of(held, j) if keep else np.zeros((held.B.shape[0], held.A.shape[1])))
            continue
        total = examples(uploads if over_all else have)
        a = sum(u.n / total * np.sqrt(u.layer.s) * u.layer.A[j] for u in have)
        b = sum(u.n / total * np.sqrt(u.layer.s) * u.layer.B[:, j] for u in have)
        slices.append(np.outer(b, a))
    return first(slices)


def zeropad(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    return factor_slices(held, uploads, keep=False, over_all=True)


def rbla(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    return factor_slices(held, uploads, keep=options["empty_slice"] == "keep", over_all=False)


def flexlora(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """`sum p_k s_k B_k A_k`."""
    return truncated(sum(u.n / examples(uploads) * u.layer.s * u.layer.B @ u.layer.A for u in uploads))


def raflora(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """`sum_j sum over C_j of q_kj s_k B_k[:, j] A_k[j]`, with the server's own slice where `C_j` is empty."""
    M = np.zeros((held.B.shape[0], held.A.shape[1]))
    for j in range(len(held.A)):
        have = owners(uploads, j)
        for u in have:
            M += u.n / examples(have) * slice_of(u.layer, j)
        if not have and options["empty_slice"] == "keep":
            M += slice_of(held, j)
    return truncated(M)


def ffa_lora(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """`sum over C_j of q_kj s_k B_k[:, j] A_0[j]`; a column that nobody trained stays."""
    slices = []
    for j in range(len(held.A)):
        have = owners(uploads, j)
        columns = [u.n / examples(have) * u.layer.s * u.layer.B[:, j] for u in have]
        slices.append(np.outer(sum(columns), held.A[j]) if have else slice_of(held, j))
    return first(slices)


def local_only(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """Each client has what it trained."""
    own = {u.client: u.layer.s * u.layer.B @ u.layer.A for u in uploads}
    return lambda client, rank: own[client]


DEFINITIONS: dict[str, Definition] = {
    "fedavg": fedavg,
    "centralized": fedavg,
    "zeropad": zeropad,
    "rbla": rbla,
    "flexlora": flexlora,
    "raflora": raflora,
    "ffa_lora": ffa_lora,
    "local-only": local_only,
}
