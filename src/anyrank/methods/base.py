"""What a method is, and the pieces that methods share: weights, slice shares, SVD shares, the mean of plain tensors.

A method is a small frozen dataclass of pure functions over a `ServerState`. Its fields are its options and nothing else.
Most methods are one rule for one layer (`merge_layer`); the rest stands here, once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from anyrank import keys, lowrank
from anyrank.adapter import Adapter, LoraLayer, iter_names
from anyrank.errors import MethodError
from anyrank.methods.registry import taking_mixed_ranks
from anyrank.records import BOTH, Client, ClientUpdate, Download, Scaling, ServerState

Split = Literal["singular-in-b", "balanced"]
EmptySlice = Literal["keep", "zero"]


class Holds(Enum):
    """For which clients a trait holds."""

    NEVER = "no"
    EQUAL = "equal ranks"
    ALWAYS = "any ranks"

    def covers(self, ranks: Sequence[int]) -> bool:
        """Whether the trait holds for clients of these ranks."""
        return self is Holds.ALWAYS or (self is Holds.EQUAL and len(set(ranks)) <= 1)


@dataclass(frozen=True)
class Traits:
    """What a method claims. The conformance suite checks each claim, and that what is not claimed has a counterexample.

    `mixed_ranks`: takes clients of unequal rank · `exact`: the new effective weight is `sum_k p_k` x the clients' ·
    `linear`: the new factors are affine in the trained ones · `gauge_free`: unchanged under `(B G, G^-1 A)` of a client ·
    `stationary`: a round in which nobody trains changes nothing · `keeps_product`: a download has the product of the
    server's slices that it names.
    """

    mixed_ranks: bool
    exact: Holds
    linear: Holds
    gauge_free: Holds
    stationary: Holds
    keeps_product: Holds = Holds.ALWAYS


class Part(NamedTuple):
    """One client's contribution to one layer: its trained `layer`, the `num_examples` that weigh it, and its `client` name."""

    layer: LoraLayer
    num_examples: int
    client: str = ""


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. A subclass gives `name`, `summary`, `paper`, `traits` and `merge_layer`, and often nothing more."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    traits: ClassVar[Traits]
    train: ClassVar[frozenset[str]] = BOTH
    send: ClassVar[frozenset[str]] = BOTH
    # What of "A", "B" and "tensors" stays with each client, which the server keeps for it where all run in one process.
    private: ClassVar[frozenset[str]] = frozenset()
    # Which factor takes up the change of scaling from the server's s(R) to a client's s(r): B alone, or both by its root.
    rescale: ClassVar[Literal["B", "both"]] = "B"
    # `weights(parts, rank)`: the weight of client k on slice j, `[K, rank]`, where the new factors are sums of the clients' by
    # these weights, scalings aside (`rescale`), and nothing else depends on what was trained. Noise at the server needs them.
    weights: ClassVar[Callable[[Sequence[Part], int], Tensor] | None] = None
    # True for the reference line that gathers all examples in one place: the federation then has one client.
    pools_data: ClassVar[bool] = False
    # True for the lines that methods are measured against, which no federation would run.
    reference: ClassVar[bool] = False

    def init(self, adapter: Adapter, scaling: Scaling, seed: int) -> ServerState:
        """The state before round 1: `adapter` at the largest rank, A random and B zero, one for all clients."""
        return ServerState(round=0, seed=seed, adapter=adapter, scaling=scaling)

    def dispatch(self, state: ServerState, client: Client) -> Download:
        """What `client` starts from: the first r slices of each layer, so scaled that they keep their product under s(r)."""
        layers = {name: self.share_layer(state, name, client.rank_of(name)) for name in state.adapter.layers}
        slices = {name: tuple(range(layer.rank)) for name, layer in layers.items()}
        adapter = replace(state.adapter, layers=layers)
        return Download(adapter, slices, self.train, self.send, self.private, state.merged, rescale=self.rescale)

    def share(self, state: ServerState, client: Client) -> Adapter:
        """What somebody of `client`'s rank would run, or start from, who takes no part in rounds."""
        return self.dispatch(state, client).adapter

    def outside_runs(self) -> Method:
        """The same rule for a merge of adapters, whose clients had no downloads: at most shares of an earlier merge."""
        return self

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """The state after the round in which `updates` came back. The order of `updates` does not matter."""
        updates = sorted(updates, key=lambda update: update.client)
        if not updates:
            return replace(state, round=state.round + 1)
        names = list(iter_names({f"client {u.client or i}": u.adapter for i, u in enumerate(updates, 1)}))
        if not self.traits.mixed_ranks:
            self._refuse_mixed_ranks(updates)
        self._refuse_ranks_above(state, updates)
        parts = {name: [Part(u.adapter.layers[name], u.num_examples, u.client) for u in updates] for name in names}
        merged = settled([self.merge_layer(state, name, parts[name]) for name in names])
        layers, into_base = {}, {}
        for name, layer in zip(names, merged, strict=True):
            layers[name] = pad(layer, state.adapter.layers[name].rank, state.seed, "fresh", state.round, name)
            base = self.merge_base(state, name, parts[name], layers[name])
            if base is not None:
                into_base[name] = base
        tensors = mean_tensors(state.adapter.tensors, updates)
        adapter = replace(state.adapter, layers=layers, tensors=tensors)
        merged = Adapter(into_base, {}, state.adapter.config) if into_base else state.merged
        return replace(state, round=state.round + 1, adapter=adapter, merged=merged)

    def merge_base(self, state: ServerState, name: str, parts: Sequence[Part], layer: LoraLayer) -> LoraLayer | None:
        """The low-rank sum that has gone into the base weight, this round's part included; `None` if the method has none.

        `layer` is the server's new layer of the round.
        """
        return None

    @abstractmethod
    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer | Unsettled:
        """The server's new factors of layer `name`, at most as many slices as `state` holds, in `state`'s dtype.

        It needs no other layer. `parts` come in the order of the clients' names.
        """

    def share_layer(self, state: ServerState, name: str, rank: int) -> LoraLayer:
        """The first `rank` slices of a layer, under the client's scaling; past the server's rank, B zero and A fresh."""
        layer, scaling = state.adapter.layers[name], state.scaling.of(name, rank)
        kept = min(rank, layer.rank)
        ratio = layer.scaling / scaling
        on_a, on_b = (math.sqrt(ratio), math.sqrt(ratio)) if self.rescale == "both" else (1.0, ratio)
        first = layer.with_factors(layer.A[:kept] * on_a, layer.B[:, :kept] * on_b, scaling)
        return pad(first, rank, state.seed, "fresh", state.round, name)

    def served(self, state: ServerState) -> Mapping[str, Adapter]:
        """The adapters that the federation's users would run, by name; all have the same weight when they are scored."""
        return {"global": state.adapter}

    def _refuse_mixed_ranks(self, updates: Sequence[ClientUpdate]) -> None:
        for name in updates[0].adapter.layers:
            ranks = sorted({update.adapter.layers[name].rank for update in updates})
            if len(ranks) > 1:
                raise MethodError(
                    f"{self.name}: expected clients of one rank, got ranks {', '.join(map(str, ranks))} in layer {name}; "
                    f"give all clients one rank, or use a method that takes mixed ranks: {taking_mixed_ranks()}"
                )

    def _refuse_ranks_above(self, state: ServerState, updates: Sequence[ClientUpdate]) -> None:
        for update in updates:
            for name, layer in update.adapter.layers.items():
                largest = state.adapter.layers[name].rank if name in state.adapter.layers else layer.rank
                if layer.rank > largest:
                    raise MethodError(
                        f"{self.name}: layer {name}: expected a rank of at most {largest}, the server's, from client "
                        f"{update.client or '?'}, got {layer.rank}; start the server at the largest rank of its clients"
                    )


# --- weights ---------------------------------------------------------------------------------------------------------


def client_weights(parts: Sequence[Part]) -> Tensor:
    """`p_k = n_k / sum n`, `[K]`."""
    counts = torch.tensor([part.num_examples for part in parts], dtype=torch.float64)
    return counts / counts.sum()


def ownership(parts: Sequence[Part], rank: int) -> Tensor:
    """1 where client k has slice j (`r_k >= j`), else 0: `[K, rank]`."""
    ranks = torch.tensor([part.layer.rank for part in parts])
    return (torch.arange(rank) < ranks[:, None]).double()


def slice_weights(parts: Sequence[Part], rank: int) -> Tensor:
    """`q_kj = n_k / sum of n over the clients that have slice j`, `[K, rank]`; zeros where client k lacks it."""
    owned = client_weights(parts)[:, None] * ownership(parts, rank)
    return owned / owned.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)


def padded_weights(parts: Sequence[Part], rank: int) -> Tensor:
    """`p_k` where client k has slice j, else 0, `[K, rank]`: who lacks a slice counts as a zero there."""
    return client_weights(parts)[:, None] * ownership(parts, rank)


# --- other slices than the first -------------------------------------------------------------------------------------


def slice_order(state: ServerState, name: str, client: str, rank: int, drawn: bool) -> list[int]:
    """The server's slices of a layer, those first that `client` trains in the round after `state`.

    They are the first `rank`, or, if `drawn`, as many without replacement by seed, round, client and layer: who knows the
    state knows the draw, so nobody has to keep it or send it.
    """
    every = range(state.adapter.layers[name].rank)
    own = every[:rank]
    if drawn:
        own = keys.rng(state.seed, "slices", state.round, client, name).choice(len(every), len(own), replace=False).tolist()
    return [*sorted(own), *sorted(set(every) - set(own))]


def reordered(state: ServerState, order: Mapping[str, Sequence[int]]) -> ServerState:
    """`state` with its slices in that order, layer by layer."""
    layers = {name: take(layer, order[name]) for name, layer in state.adapter.layers.items()}
    return replace(state, adapter=replace(state.adapter, layers=layers))


def take(layer: LoraLayer, slices: Sequence[int]) -> LoraLayer:
    """The named slices of a layer, in that order."""
    if list(slices) == list(range(layer.rank)):
        return layer
    return layer.with_factors(layer.A[slices], layer.B[:, slices])


def frozen_rest(state: ServerState, ranks: Mapping[str, int]) -> Adapter | None:
    """The slices past `ranks` that apply something, as a sum that a client adds to its base model; `None` if there are none."""
    rest = {}
    for name, layer in state.adapter.layers.items():
        applies = (layer.A.any(dim=1) & layer.B.any(dim=0)).tolist()
        alive = [j for j in range(ranks[name], layer.rank) if applies[j]]
        rest |= {name: take(layer, alive)} if alive else {}
    return Adapter(rest, {}, state.adapter.config) if rest else None


def widened(adapter: Adapter, rank: int, scaling: Scaling, seed: int) -> Adapter:
    """`adapter`, in which nothing is learned yet, at `rank` (or its own, if larger), as far as each layer can carry it."""
    wide = {name: pad(layer, min(rank, *layer.shape), seed, "fresh", 0, name) for name, layer in adapter.layers.items()}
    layers = {name: replace(layer, scaling=scaling.of(name, layer.rank)) for name, layer in wide.items()}
    return replace(adapter, layers=layers)


# --- factors averaged slice by slice ---------------------------------------------------------------------------------


# Numbers of a block that is summed at a time, in float64: half a megabyte, which stays in a core's cache until it is rounded.
_BLOCK = 1 << 16


def average_slices(parts: Sequence[Part], weights: Tensor, empty: LoraLayer | None = None) -> tuple[Tensor, Tensor]:
    """`sum_k w_kj sqrt(s_k) A_k[j]` and the same of B: factors `[R, in]`, `[out, R]` (float64) of an update of scaling 1.

    The root of each client's scaling goes to each factor, so that clients of unequal alpha/r average what they apply.
    Slices that no client has are zero, or those of `empty`.
    """
    return _averages(parts, weights, empty, 1.0, torch.float64)


def average_layer(
    state: ServerState, name: str, parts: Sequence[Part], weights: Tensor, empty: LoraLayer | None = None
) -> LoraLayer:
    """The server's layer from the averages of `average_slices`, half of `1/s(R)` to each factor, rounded once."""
    layer = state.adapter.layers[name]
    return layer.with_factors(*_averages(parts, weights, empty, layer.scaling, layer.A.dtype))


def _averages(
    parts: Sequence[Part], weights: Tensor, empty: LoraLayer | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The averages as factors of an update of this `scaling`, summed in float64, in `dtype`."""
    layers, rank = [part.layer for part in parts], weights.shape[1]
    first, (out, width) = layers[0], layers[0].shape
    shares = [math.sqrt(layer.scaling / scaling) * w[: layer.rank] for layer, w in zip(layers, weights, strict=True)]
    shares = [share.to(first.A.device) for share in shares]
    A, B = first.A.new_empty(rank, width, dtype=dtype), first.B.new_empty(out, rank, dtype=dtype)
    _sum_into(A, [layer.A for layer in layers], [share[:, None] for share in shares])
    _sum_into(B, [layer.B for layer in layers], [share.expand(out, -1) for share in shares])
    if empty is not None:
        lone = (weights[:, : empty.rank].sum(dim=0) == 0).nonzero().squeeze(1).to(A.device)
        root = math.sqrt(empty.scaling / scaling)
        A[lone] = (root * empty.A[lone].double()).to(dtype)
        B[:, lone] = (root * empty.B[:, lone].double()).to(dtype)
    return A, B


def _sum_into(total: Tensor, factors: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
    """`total[i, j] = sum_k shares[k][i, j] factors[k][i, j]` over those factors that reach (i, j); the rest is zero."""
    step = max(1, _BLOCK // total.shape[1])
    room = total.new_empty(min(step, len(total)), total.shape[1], dtype=torch.float64)
    for start in range(0, len(total), step):
        rows = slice(start, min(start + step, len(total)))
        block = room[: rows.stop - start].zero_()
        for factor, share in zip(factors, shares, strict=True):
            part = factor[rows]
            block[: len(part), : part.shape[1]].addcmul_(share[rows], part)  # each number made float64 on its way
        total[rows] = block


# --- one factor averaged slice by slice, the other common to all ------------------------------------------------------


def mean_a(state: ServerState, name: str, parts: Sequence[Part]) -> Tensor:
    """`sum over owners of q_kj A_k[j]`, `[R, in]` (float64); a slice that no client of the round has stays as it was."""
    layer = state.adapter.layers[name]
    weights = slice_weights(parts, layer.rank).to(layer.A.device)
    A = layer.A.double() * (weights.sum(dim=0) == 0)[:, None]
    for (sent, *_), w in zip(parts, weights, strict=True):
        A[: sent.rank] += w[: sent.rank, None] * sent.A.double()
    return A


def mean_b(state: ServerState, name: str, parts: Sequence[Part]) -> Tensor:
    """`sum over owners of q_kj s_k / s(R) B_k[:, j]`, `[out, R]` (float64); a slice that no client has stays as it was."""
    layer = state.adapter.layers[name]
    weights = slice_weights(parts, layer.rank).to(layer.B.device)
    B = layer.B.double() * (weights.sum(dim=0) == 0)
    for (sent, *_), w in zip(parts, weights, strict=True):
        B[:, : sent.rank] += w[: sent.rank] * (sent.scaling / layer.scaling) * sent.B.double()
    return B


# --- products, and their SVD -----------------------------------------------------------------------------------------


def weighted_product(parts: Sequence[Part], weights: Tensor) -> lowrank.Product:
    """`sum_k sum_j w_kj s_k B_k[:, j] A_k[j]`, as factors, for weights `[K, R]`."""
    return lowrank.stack([lowrank.of_layer(layer, w[: layer.rank]) for (layer, *_), w in zip(parts, weights, strict=True)])


class Unsettled(NamedTuple):
    """A new layer whose product is still to be decomposed, so that those of many layers are decomposed side by side.

    `finish` makes the layer of the product's top `rank` triples, or of all (`None`).
    """

    product: lowrank.Product
    rank: int | None
    finish: Callable[[lowrank.SVD], LoraLayer]


def settled(layers: Sequence[LoraLayer | Unsettled]) -> list[LoraLayer]:
    """The layers, those too that waited for their SVD."""
    waiting = [layer for layer in layers if isinstance(layer, Unsettled)]
    found = iter(lowrank.svd_all([layer.product for layer in waiting], [layer.rank for layer in waiting]))
    return [layer.finish(next(found)) if isinstance(layer, Unsettled) else layer for layer in layers]


def top_of(state: ServerState, name: str, product: lowrank.Product, split: Split) -> Unsettled:
    """The server's layer for the top of `product`'s SVD, see `from_svd`; what `merge_layer` may return in its place."""
    return Unsettled(product, state.adapter.layers[name].rank, lambda found: from_svd(state, name, found, split))


def from_product(state: ServerState, name: str, product: lowrank.Product, split: Split) -> LoraLayer:
    """As `top_of`, at once."""
    return settled([top_of(state, name, product, split)])[0]


def from_svd(state: ServerState, name: str, found: lowrank.SVD, split: Split) -> LoraLayer:
    """The server's layer with the product of `found`: `B = U S / s`, `A = Vt`, or the root of S to each (balanced)."""
    layer, (U, S, Vt) = state.adapter.layers[name], found
    if len(S) == 0:  # nothing learned: the product is zero, with one factor as it was, alive for the next round
        keeps_a = bool(layer.A.any())  # an embedding starts with A zero and B random
        return layer.with_factors(layer.A, torch.zeros_like(layer.B)) if keeps_a else layer
    if split == "balanced":
        root = (S / layer.scaling).sqrt()
        return layer.with_factors(root[:, None] * Vt, U * root)
    return layer.with_factors(Vt, U * (S / layer.scaling))


def empty_slices(state: ServerState, name: str, weights: Tensor) -> lowrank.Product:
    """The server's own previous slices that no client of the round has, as a product."""
    layer = state.adapter.layers[name]
    return lowrank.of_layer(layer, (weights.sum(dim=0) == 0).double())


def pad(layer: LoraLayer, rank: int, seed: int, *names: str | int) -> LoraLayer:
    """`layer` brought to `rank` by slices that change nothing yet can learn: B zero, A fresh from the key of `names`."""
    missing = rank - layer.rank
    if missing <= 0:
        return layer
    fresh = init_a(missing, layer, keys.generator(seed, *names))
    A = torch.cat([layer.A, fresh])
    B = torch.cat([layer.B, layer.B.new_zeros(layer.B.shape[0], missing)], dim=1)
    return layer.with_factors(A, B)


def init_a(rank: int, like: LoraLayer, generator: torch.Generator) -> Tensor:
    """PEFT's own start of A: uniform within `1/sqrt(in)` (Kaiming with a = sqrt 5), `[rank, in]`, in `like`'s dtype."""
    width = like.A.shape[1]
    draw = torch.rand(rank, width, generator=generator, dtype=torch.float64) * 2 - 1
    return (draw / math.sqrt(width)).to(like.A.dtype).to(like.A.device)


# --- what goes into the base weight ----------------------------------------------------------------------------------

# Singular values below this share of the largest are dropped from the sum in the base weight: float32's rounding.
_ROUNDING = 1e-7


def add_to_base(state: ServerState, name: str, product: lowrank.Product) -> LoraLayer | None:
    """What is in the base weight so far and `product` on top, as one layer of scaling 1; `None` while that is nothing.

    The sum is exact: factors side by side. Once they hold more numbers than the weight itself, it is written anew by its
    SVD, at its numerical rank, so that its rank stays below `min(out, in)` however many rounds there are.
    """
    layer = state.adapter.layers[name]
    before = state.merged.layers.get(name) if state.merged else None
    total = balanced(product)
    if before:
        total = lowrank.stack([lowrank.of_layer(before), total])
    out, width = layer.shape
    if total.slices * (out + width) > out * width:
        total = balanced(total, min(_ROUNDING, torch.finfo(layer.A.dtype).eps))
    if total.slices == 0:
        return before.with_factors(0 * before.A[:1], 0 * before.B[:, :1]) if before else None
    return layer.with_factors(total.right, total.left, scaling=1.0)


def balanced(product: lowrank.Product, floor: float = 0.0) -> lowrank.Product:
    """`product` by its SVD, `U sqrt(S)` and `sqrt(S) Vt`, without the singular values below `floor` times the largest."""
    U, S, Vt = lowrank.svd(lowrank.Product(product.left, product.right))  # in float64 for any dtype: errors would add up
    keep = int((floor * S.max() <= S).sum()) if len(S) else 0
    root = S[:keep].sqrt()
    return lowrank.Product(U[:, :keep] * root, root[:, None] * Vt[:keep])


# --- plain tensors ---------------------------------------------------------------------------------------------------


def mean_tensors(previous: Mapping[str, Tensor], updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Each plain tensor's mean over the clients that sent it, weighted by examples; `previous` where none did."""
    tensors = dict(previous)
    for name in sorted({name for update in updates for name in update.adapter.tensors}):
        senders = [update for update in updates if name in update.adapter.tensors]
        total = sum(update.num_examples for update in senders)
        mean = sum(update.adapter.tensors[name].double() * (update.num_examples / total) for update in senders)
        dtype = senders[0].adapter.tensors[name].dtype
        tensors[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype)  # a counter is a whole number
    return tensors
