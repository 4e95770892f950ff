"""What each method computes, written plainly: dense float64 matrices and loops, straight from the page of definitions.

Nothing here uses the package. A layer is `Held(A, B, s)`, an upload is a layer with its example count `n` and the server's
slices that it is of. A definition gives, for one layer, the function `share(client, slices)`: the change of the weight
`[out, in]` that a client with those of the server's slices applies after the round, on top of what was in the base model when
it trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize


class Held(NamedTuple):
    """`A` `[r, in]`, `B` `[out, r]`, scaling `s`."""

    A: np.ndarray
    B: np.ndarray
    s: float


class Upload(NamedTuple):
    """A client's trained layer, the examples that weigh it, and which of the server's slices its own are."""

    client: str
    layer: Held
    n: int
    slices: tuple[int, ...]


Share = Callable[[str, Sequence[int]], np.ndarray]
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
    """Singular triples of M: the first r of them are its best approximation at the client's rank."""

    def share(client: str, slices: Sequence[int]) -> np.ndarray:
        U, S, Vt = np.linalg.svd(M)
        return sum((S[i] * np.outer(U[:, i], Vt[i]) for i in slices if i < len(S)), np.zeros_like(M))

    return share


def those(products: Sequence[np.ndarray]) -> Share:
    """The slices asked for."""
    return lambda client, slices: sum((products[j] for j in slices), np.zeros_like(products[0]))


def fedavg(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """`A = sum p_k A_k`, `B = sum p_k B_k`, for clients of one rank, whose scaling is then one too."""
    p = {u.client: u.n / examples(uploads) for u in uploads}
    A = sum(p[u.client] * u.layer.A for u in uploads)
    B = sum(p[u.client] * u.layer.B for u in uploads)
    s = uploads[0].layer.s
    return those([slice_of(Held(A, B, s), j) for j in range(len(A))])


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
    return those(slices)


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
    return those(slices)


def hetlora(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """As zero-padding, with the products' Frobenius norms for the examples."""
    norms = [np.linalg.norm(u.layer.s * u.layer.B @ u.layer.A) for u in uploads]
    return zeropad(held, [u._replace(n=norm) for u, norm in zip(uploads, norms, strict=True)], options)


def mean_of_products(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """`sum p_k s_k B_k A_k`, whole, for a client of any rank: in the base, or in base and adapter together."""
    M = sum(u.n / examples(uploads) * u.layer.s * u.layer.B @ u.layer.A for u in uploads)
    return lambda client, slices: M


def rolora(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """Means of both factors over the owners of each slice: of the one that was not trained, that is what it was."""
    slices = []
    for j in range(len(held.A)):
        have = owners(uploads, j)
        b = sum(u.n / examples(have) * u.layer.s * u.layer.B[:, j] for u in have)
        a = sum(u.n / examples(have) * u.layer.A[j] for u in have)
        slices.append(np.outer(b, a) if have else slice_of(held, j))
    return those(slices)


def fedsa(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """The client's own B times the mean of A over the owners of each row; a row that nobody has stays."""
    rows = []
    for j in range(len(held.A)):
        have = owners(uploads, j)
        rows.append(sum(u.n / examples(have) * u.layer.A[j] for u in have) if have else held.A[j])
    own = {u.client: u.layer.s * u.layer.B for u in uploads}
    return lambda client, slices: own[client] @ np.array(rows)[list(slices)]


def florist(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """FlexLoRA's product, cut to the fewest singular values that hold the share `energy` of its energy."""
    M = sum(u.n / examples(uploads) * u.layer.s * u.layer.B @ u.layer.A for u in uploads)
    S = np.linalg.svd(M, compute_uv=False)
    enough = next(p for p in range(1, len(S) + 1) if np.sum(S[:p] ** 2) >= options["energy"] * np.sum(S**2))
    return truncated(truncated(M)("", range(min(enough, len(held.A)))))


def lora_fair(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """RBLA's A and B, and the D at which the gradient of `1 - cos(W, (B + D) A) + penalty |D|^2` vanishes; W as raFLoRA's."""
    A, B, W = np.zeros_like(held.A), np.zeros_like(held.B), np.zeros((held.B.shape[0], held.A.shape[1]))
    for j in range(len(held.A)):
        have = owners(uploads, j)
        A[j] = sum(u.n / examples(have) * np.sqrt(u.layer.s / held.s) * u.layer.A[j] for u in have) if have else held.A[j]
        B[:, j] = (
            sum(u.n / examples(have) * np.sqrt(u.layer.s / held.s) * u.layer.B[:, j] for u in have) if have else held.B[:, j]
        )
        W += sum(u.n / examples(have) * slice_of(u.layer, j) for u in have) if have else slice_of(held, j)

    def gradient(D: np.ndarray) -> np.ndarray:
        D = D.reshape(B.shape)
        X = held.s * (B + D) @ A
        w, x, dot = np.linalg.norm(W), np.linalg.norm(X), np.sum(W * X)
        return (held.s * (dot * X / (w * x**3) - W / (w * x)) @ A.T + 2 * options["penalty"] * D).ravel()

    D = scipy.optimize.root(gradient, np.zeros(B.size), tol=1e-13).x.reshape(B.shape)
    return those([slice_of(Held(A, B + D, held.s), j) for j in range(len(A))])


def fedsvd(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """FFA-LoRA's product, whose best part of rank r a client gets."""
    return truncated(ffa_lora(held, uploads, options)("", range(len(held.A))))


def local_only(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """Each client has what it trained."""
    own = {u.client: u.layer.s * u.layer.B @ u.layer.A for u in uploads}
    return lambda client, slices: own[client]


def stayput(held: Held, uploads: Sequence[Upload], options: Mapping[str, Any]) -> Share:
    """`sum_j [G_j + sum over C_j of w_kj (P_kj - G_j)]`, `w_kj = n_k / ((sum_{C_j} n)^tau (sum n)^(1 - tau))`.

    `C_j` are the clients that were given slice j. With the true point a client runs all the server's slices, whichever it
    trains.
    """
    M = np.zeros((held.B.shape[0], held.A.shape[1]))
    for j in range(len(held.A)):
        G, have = slice_of(held, j), [u for u in uploads if j in u.slices]
        w = {u.client: u.n / (examples(have) ** options["tau"] * examples(uploads) ** (1 - options["tau"])) for u in have}
        M += G + sum(w[u.client] * (slice_of(u.layer, u.slices.index(j)) - G) for u in have)
    everything = truncated(M)("", range(len(held.A)))
    return (lambda client, slices: everything) if options["true_point"] else truncated(M)


DEFINITIONS: dict[str, Definition] = {
    "fedavg": fedavg,
    "centralized": fedavg,
    "zeropad": zeropad,
    "rbla": rbla,
    "flexlora": flexlora,
    "raflora": raflora,
    "ffa_lora": ffa_lora,
    "hetlora": hetlora,
    "flora": mean_of_products,
    "fedex": mean_of_products,
    "rolora": rolora,
    "fedsa": fedsa,
    "florist": florist,
    "lora_fair": lora_fair,
    "fedsvd": fedsvd,
    "local-only": local_only,
    "stayput": stayput,
}
