"""The base class of methods, and the parts that they share: weights, slice shares, SVD shares, the mean of plain tensors.

A method is a small frozen dataclass of pure functions over a `ServerState`. Its fields are its options and nothing else.
Most methods are one rule for one layer (`merge_layer`); everything else is here, once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anyrank import devices
from anyrank.adapter.adapter import Adapter, iter_names
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.lazy import outlined
from anyrank.errors import AnyRankError, MethodError, in_a_line
from anyrank.messages.records import BOTH, Client, ClientUpdate, Download, Scaling, ServerState, layer_bytes
from anyrank.messages.spooled import layers_in, spool_of
from anyrank.methods.averages import EmptySlice, average_layer, average_slices, mean_a, mean_b
from anyrank.methods.parts import Part, client_weights, mean_tensors, ownership, padded_weights, slice_weights
from anyrank.methods.products import (
    Split,
    Unsettled,
    add_to_base,
    balanced,
    empty_slices,
    from_product,
    from_svd,
    settled,
    top_of,
    weighted_product,
)
from anyrank.methods.slices import frozen_rest, init_a, layer_by_layer, pad, reordered, slice_order, take, times, widened

__all__ = [
    "EmptySlice",
    "Holds",
    "Method",
    "Part",
    "Split",
    "Traits",
    "Unsettled",
    "add_to_base",
    "average_layer",
    "average_slices",
    "balanced",
    "client_weights",
    "empty_slices",
    "from_product",
    "from_svd",
    "frozen_rest",
    "init_a",
    "mean_a",
    "mean_b",
    "mean_tensors",
    "ownership",
    "pad",
    "padded_weights",
    "reordered",
    "settled",
    "slice_order",
    "slice_weights",
    "take",
    "top_of",
    "weighted_product",
    "widened",
]


class Holds(Enum):
    """The clients for which a trait holds."""

    NEVER = "no"
    EQUAL = "equal ranks"
    ALWAYS = "any ranks"

    def covers(self, ranks: Sequence[int]) -> bool:
        """Whether the trait holds for clients of these ranks."""
        return self is Holds.ALWAYS or (self is Holds.EQUAL and len(set(ranks)) <= 1)


@dataclass(frozen=True)
class Traits:
    """What a method claims. The conformance suite checks each claim, and that each trait not claimed has a counterexample.

    `mixed_ranks`: accepts clients of unequal rank · `exact`: the new effective weight is `sum_k p_k` x the clients' ·
    `linear`: the new factors are affine in the trained ones · `gauge_free`: unchanged under `(B G, G^-1 A)` of a client ·
    `stationary`: a round in which no client trains changes nothing · `keeps_product`: a download has the same product as the
    server's slices that it names.
    """

    mixed_ranks: bool
    exact: Holds
    linear: Holds
    gauge_free: Holds
    stationary: Holds
    keeps_product: Holds = Holds.ALWAYS


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. A subclass gives `name`, `summary`, `paper`, `traits` and `merge_layer`, and often nothing more."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    traits: ClassVar[Traits]
    train: ClassVar[frozenset[str]] = BOTH
    send: ClassVar[frozenset[str]] = BOTH
    # Which of "A", "B" and "tensors" stay with each client. In a simulation, the server stores them for the client.
    private: ClassVar[frozenset[str]] = frozenset()
    # The factor that takes the change of scaling from the server's s(R) to a client's s(r): B alone, or both by its root.
    rescale: ClassVar[Literal["B", "both"]] = "B"
    # `weights(parts, rank)`: the weight of client k on slice j, `[K, rank]`, if the new factors are sums of the clients'
    # factors with these weights (apart from scalings, see `rescale`) and depend on nothing else that was trained. Noise at the
    # server needs them.
    weights: ClassVar[Callable[[Sequence[Part], int], Tensor] | None] = None
    # True for the reference line that gathers all examples in one place: the federation then has one client.
    pools_data: ClassVar[bool] = False
    # True if other factors are trained in other rounds.
    alternates: ClassVar[bool] = False
    # Whether clients weigh by their numbers of examples, so that other numbers are other weights.
    by_examples: ClassVar[bool] = True
    # Whether a slice is averaged over the clients that have it, so that a single owner has all of the weight on it.
    by_owners: ClassVar[bool] = False
    # Whether a layer's new factors need no other layer. A method with an `aggregate` of its own has to say so itself.
    by_layer: ClassVar[bool] = True
    # True for the reference lines that methods are compared with; no real federation would run them.
    reference: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "aggregate" in vars(cls) and "by_layer" not in vars(cls):
            cls.by_layer = False

    @property
    def prunes(self) -> bool:
        """Whether clients may lower their own ranks."""
        return False

    def lone_weight(self, share: float) -> float:
        """The weight of a client on a slice that no other client of the round has; `share`: its share of the examples."""
        return 1.0 if self.by_owners else share

    def init(self, adapter: Adapter, scaling: Scaling, seed: int) -> ServerState:
        """The state before round 1: `adapter` at the largest rank, A random and B zero, one for all clients."""
        return ServerState(round=0, seed=seed, adapter=adapter, scaling=scaling)

    def dispatch(self, state: ServerState, client: Client) -> Download:
        """The download of `client`: the first r slices of each layer, rescaled so that their product is the same under s(r)."""
        layers = layer_by_layer(state, lambda held, name: self.share_layer(held, name, client.rank_of(name)))
        slices = {name: tuple(range(layer.rank)) for name, layer in outlined(layers).items()}
        adapter = replace(state.adapter, layers=layers)
        return Download(adapter, slices, self.train, self.send, self.private, state.merged, rescale=self.rescale)

    def share(self, state: ServerState, client: Client) -> Adapter:
        """The adapter for a client of this rank outside of rounds, to run or to start from."""
        return self.dispatch(state, client).adapter

    def outside_runs(self) -> Method:
        """The same rule for a merge outside of a run, where clients had no downloads, at most shares of an earlier merge."""
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
        spool = spool_of(updates)
        spool = spool and spool.fresh()
        layers, into_base, trimming = layers_in(spool), layers_in(spool), devices.Trimming()
        for some in [[name] for name in names] if spool else [names]:  # updates in a spool are read one layer at a time
            for name, layer, base in self._merged_layers(state, some, updates):
                layers[name] = layer
                if base is not None:
                    into_base[name] = base
            if spool:
                trimming.freed(sum(layer_bytes(update.adapter, name) for name in some for update in updates))
        tensors = mean_tensors(state.adapter.tensors, updates)
        adapter = replace(state.adapter, layers=layers, tensors=tensors)
        merged = Adapter(into_base, {}, state.adapter.config) if into_base else state.merged
        return replace(state, round=state.round + 1, adapter=adapter, merged=merged)

    def _merged_layers(
        self, state: ServerState, names: Sequence[str], updates: Sequence[ClientUpdate]
    ) -> Iterator[tuple[str, LoraLayer, LoraLayer | None]]:
        """The new layers, and what goes into the base weight."""
        parts = {name: [Part(u.adapter.layers[name], u.num_examples, u.client) for u in updates] for name in names}
        merged = settled([self._merged(state, name, parts[name]) for name in names])
        for name, layer in zip(names, merged, strict=True):
            layer = pad(layer, state.rank_of(name), state.seed, "fresh", state.round, name)
            yield name, layer, self.merge_base(state, name, parts[name], layer)

    def _merged(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer | Unsettled:
        """What `merge_layer` gives, if it is a layer. A rule of somebody's own that breaks is named, with the layer."""
        try:
            layer = self.merge_layer(state, name, parts)
        except (AnyRankError, OverflowError, torch.linalg.LinAlgError):  # of numbers, not of the rule: who asked names them
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise MethodError(f"{self.name}: its rule for layer {name} raised {in_a_line(error)}") from error
        if not isinstance(layer, (LoraLayer, Unsettled)):
            raise MethodError(f"{self.name}: its rule for layer {name} gave no LoraLayer but {type(layer).__name__}")
        return layer

    def merge_base(self, state: ServerState, name: str, parts: Sequence[Part], layer: LoraLayer) -> LoraLayer | None:
        """The low-rank sum in the base weight, including this round's part; `None` if the method has none.

        `layer` is the server's new layer of the round.
        """
        return None

    @abstractmethod
    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer | Unsettled:
        """The server's new factors of layer `name`, at most as many slices as `state` holds, in `state`'s dtype.

        It needs no other layer. `parts` are in the order of the clients' names.
        """

    def share_layer(self, state: ServerState, name: str, rank: int) -> LoraLayer:
        """The first `rank` slices of a layer, under the client's scaling; past the server's rank, B zero and A fresh."""
        layer, scaling = state.adapter.layers[name], state.scaling.of(name, rank)
        kept = min(rank, layer.rank)
        ratio = layer.scaling / scaling
        on_a, on_b = (math.sqrt(ratio), math.sqrt(ratio)) if self.rescale == "both" else (1.0, ratio)
        first = layer.with_factors(times(layer.A[:kept], on_a), times(layer.B[:, :kept], on_b), scaling)
        return pad(first, rank, state.seed, "fresh", state.round, name)

    def served(self, state: ServerState) -> Mapping[str, Adapter]:
        """The adapters that users of the federation would run, by name; scores give them equal weights."""
        return {"global": state.adapter}

    def _refuse_mixed_ranks(self, updates: Sequence[ClientUpdate]) -> None:
        for name in updates[0].adapter.layers:
            ranks = sorted({outlined(update.adapter.layers)[name].rank for update in updates})
            if len(ranks) > 1:
                raise MethodError(
                    f"{self.name}: expected clients of one rank, got ranks {', '.join(map(str, ranks))} in layer {name}; "
                    f"give all clients one rank, or use a method that takes mixed ranks (see `anyrank methods`)"
                )

    def _refuse_ranks_above(self, state: ServerState, updates: Sequence[ClientUpdate]) -> None:
        held = outlined(state.adapter.layers)
        for update in updates:
            for name, layer in outlined(update.adapter.layers).items():
                largest = held[name].rank if name in held else layer.rank
                if layer.rank > largest:
                    raise MethodError(
                        f"{self.name}: layer {name}: expected a rank of at most {largest}, the server's, from client "
                        f"{update.client or '?'}, got {layer.rank}; start the server at the largest rank of its clients"
                    )
