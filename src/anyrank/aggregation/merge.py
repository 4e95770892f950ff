"""One merge, checked before any number is read: the clients, the server's state, and the method's rule layer by layer."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from anyrank import methods
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer, finite, overflow
from anyrank.adapter.stored import is_stored, open_adapter, outline, unchecked
from anyrank.aggregation import fitting
from anyrank.errors import AdapterError, shortened
from anyrank.messages.records import BOTH, Client, ClientUpdate, Scaling, ServerState
from anyrank.methods import Method
from anyrank.methods.base import Holds


@dataclass(frozen=True)
class Merge:
    """One merge. `outline` and `tensors` have the shapes of layers and plain tensors; `dtype` is that of the result.

    `updates` are in the order of the clients' names; their adapters may be stored ones, which are read layer by layer.
    `frozen`: the base weights that PEFT saved beside adapted embeddings, the same in all adapters.
    """

    method: Method
    updates: Sequence[ClientUpdate]
    previous: Adapter | None
    scaling: Scaling
    seed: int
    dtype: torch.dtype
    outline: Mapping[str, LoraLayer]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    rank: int = 0  # of the result, where that is not the clients' largest

    @property
    def names(self) -> list[str]:
        return sorted(self.outline)

    def state(self) -> ServerState:
        """The server's state before the round with all layers, for a method that does not work layer by layer."""
        layers = {name: self._held(name, self._sent(name)) for name in self.names}
        tensors = dict(self.previous.tensors) if self.previous else {}
        return ServerState(0, self.seed, Adapter(layers, tensors, self.config), self.scaling)

    def batches(self, batch_bytes: int) -> Iterator[list[str]]:
        """The names in order, in batches of at most `batch_bytes` of the clients' factors; one by one if that is 0."""
        batch, held = [], 0
        for name in self.names:
            size = sum(_nbytes(outline(update.adapter).layers[name]) for update in self._owners(name))
            if batch and held + size > batch_bytes:
                yield batch
                batch, held = [], 0
            batch, held = [*batch, name], held + size
        yield batch

    @property
    def has_base_update(self) -> bool:
        """Whether a part goes into the base model: known from one layer."""
        return any(base is not None for _, base in self.layers(self.names[:1]).values())

    def layers(self, names: Sequence[str]) -> dict[str, tuple[LoraLayer, LoraLayer | None]]:
        """The new layers, and what goes into the base model, from these layers of each client.

        Raises `AdapterError` where a client's numbers are not finite, or a result is too large for its number type.
        """
        if self._adds_up:
            sent = {name: self.sent(name) for name in names}
        else:
            sent = {name: self._sent(name) for name in names}
        try:
            found = self._layers(sent)
        except (OverflowError, torch.linalg.LinAlgError):  # numbers that are finite, and whose squares are not
            raise self.too_large(", ".join(names[:3]), "what is computed from it") from None
        for name, (merged, base) in found.items():
            self._check(name, merged)
            if base is not None:
                self._check(name, base)
        return found

    def _check(self, name: str, layer: LoraLayer) -> None:
        if large := overflow(layer):
            self._sent(name)  # says whose numbers are none; finite ones may be too large together
            raise self.too_large(name, large)

    def too_large(self, name: str, what: str) -> AdapterError:
        return AdapterError(
            f"layer {name}: {what} is too large for {str(self.dtype).removeprefix('torch.')}; look for the adapter with the "
            "largest norm (anyrank inspect): its training diverged, or its alpha is wrong"
        )

    @property
    def _adds_up(self) -> bool:
        """Whether all uploaded numbers go into sums: a sum is not finite if a term is not, so terms need no separate check."""
        return self.method.traits.linear is not Holds.NEVER and self.method.send >= BOTH

    def _layers(self, sent: Mapping[str, Mapping[str, LoraLayer]]) -> dict[str, tuple[LoraLayer, LoraLayer | None]]:
        by_owners: dict[frozenset[str], list[str]] = {}
        for name, layers in sent.items():
            by_owners.setdefault(frozenset(layers), []).append(name)
        found: dict[str, tuple[LoraLayer, LoraLayer | None]] = {}
        for owners, names in by_owners.items():
            found |= self._merged(owners, {name: sent[name] for name in names})
        return found

    def _merged(
        self, owners: frozenset[str], sent: Mapping[str, Mapping[str, LoraLayer]]
    ) -> dict[str, tuple[LoraLayer, LoraLayer | None]]:
        """The layers that `owners` have: whoever lacks them has no say in them, and no weight."""
        if not owners:
            return {name: (self._previous(name), None) for name in sent}
        held = {name: self._held(name, layers) for name, layers in sent.items()}
        state = ServerState(0, self.seed, Adapter(held, {}, self.config), self.scaling)
        updates = [
            replace(update, adapter=Adapter({name: layers[update.client] for name, layers in sent.items()}))
            for update in self.updates
            if update.client in owners
        ]
        after = self.method.aggregate(state, updates)
        into_base = after.merged.layers if after.merged else {}
        return {name: (after.adapter.layers[name], into_base.get(name)) for name in sent}

    def tensor(self, name: str) -> Tensor:
        """The new plain tensor (a head, a bias), from those clients that have it."""
        held = {name: self.previous.tensors[name]} if self.previous and name in self.previous.tensors else {}
        state = ServerState(0, self.seed, Adapter({}, held, self.config), self.scaling)
        senders = [update for update in self.updates if name in update.adapter.tensors]
        sent = [replace(u, adapter=Adapter({}, {name: u.adapter.tensors[name].to(self.tensors[name].dtype)})) for u in senders]
        merged = self.method.aggregate(state, sent).adapter.tensors[name]
        return finite(merged, "the mean of the clients", name)

    def share(self, name: str, layer: LoraLayer, rank: int) -> LoraLayer:
        """The share of the new `layer` for a client of `rank`."""
        state = ServerState(1, self.seed, Adapter({name: layer}, {}, self.config), self.scaling)
        shared = self.method.share(state, Client(f"rank-{rank}", rank)).layers[name]
        if large := overflow(shared):
            raise self.too_large(f"{name}, rank {rank}", large)
        return shared

    def check_rank(self, rank: int) -> None:
        """Raise `AdapterError` for a rank that no layer has room for, and no client has."""
        check_rank(rank, [*outline_ranks(self.updates), *(max(layer.shape) for layer in self.outline.values())])

    def describe(self, update: ClientUpdate) -> dict[str, Any]:
        ranks = outline(update.adapter).ranks.values()
        return {"client": update.client, "num_examples": update.num_examples, "ranks": sorted(set(ranks))}

    def sent(self, name: str) -> dict[str, LoraLayer]:
        """The layer as the clients that have it sent it."""
        return {update.client: unchecked(update.adapter, name) for update in self._owners(name)}

    def _sent(self, name: str) -> dict[str, LoraLayer]:
        return {update.client: update.adapter.layers[name] for update in self._owners(name)}

    def _owners(self, name: str) -> list[ClientUpdate]:
        return [update for update in self.updates if name in update.adapter.layers]

    def _held(self, name: str, sent: Mapping[str, LoraLayer]) -> LoraLayer:
        """The server's layer before the merge: that of `previous`, or an untrained one, at the clients' largest rank."""
        largest = max(sent.values(), key=lambda layer: layer.rank)
        if self.method.train != BOTH:
            fitting.common_a(self.method, name, sent, largest)
        if self.previous is None or name not in self.previous.layers:
            rank = self._rank(name, largest.rank, sent)
            A = torch.cat([largest.A, largest.A.new_zeros(rank - largest.rank, largest.A.shape[1])])
            B = largest.B.new_zeros(largest.B.shape[0], rank)
            return self._wide(largest, A, B, self.scaling.of(name, rank))
        held = self.previous.layers[name]
        missing = max(0, largest.rank - held.rank)
        A = torch.cat([held.A, largest.A[held.rank :].to(held.A.dtype)])
        B = torch.cat([held.B, held.B.new_zeros(held.B.shape[0], missing)], dim=1)
        return self._wide(held, A, B, held.scaling)

    def _previous(self, name: str) -> LoraLayer:
        """A layer that no client has stays as it was."""
        held = self.previous.layers[name]
        return self._wide(held, held.A, held.B, held.scaling)

    def _rank(self, name: str, largest: int, sent: Mapping[str, LoraLayer]) -> int:
        """The rank of a layer of the result: `largest` of the clients, or the one asked for, as far as they fill it."""
        return max(largest, min(self.rank, sum(layer.rank for layer in sent.values()), min(self.outline[name].shape)))

    def _wide(self, like: LoraLayer, A: Tensor, B: Tensor, scaling: float) -> LoraLayer:
        return LoraLayer(A.to(self.dtype), B.to(self.dtype), scaling, like.kind, like.kernel)


def prepare(
    updates: Iterable[ClientUpdate | str | os.PathLike[str]],
    method: str | Method,
    previous: Adapter | str | os.PathLike[str] | None,
    seed: int,
    scaling: Scaling | None,
    allow_different_base: bool,
    options: Mapping[str, Any],
    absent: str = "refused",
    rank: int = 0,
) -> Merge:
    """The merge of `updates` (see `aggregate`), after every check that needs no numbers: names, shapes, ranks, base model.

    Raises `AdapterError`, with both sides, if two adapters do not fit together, and `MethodError` for a method that does not
    merge or does not accept these clients.
    """
    method = (methods.make(method, options) if isinstance(method, str) else method).outside_runs()
    updates = [fitting.update(update, position) for position, update in enumerate(updates, 1)]
    if not updates:
        raise AdapterError("aggregate: expected at least one client's adapter, got none")
    fitting.distinct([update.client for update in updates])
    previous = open_adapter(previous) if isinstance(previous, (str, os.PathLike)) else previous
    fitting.mergeable(method, any(is_stored(update.adapter) for update in updates))
    clients = {update.client: outline(update.adapter) for update in updates}
    if not method.traits.mixed_ranks:
        fitting.one_rank(method, clients)
    held = {} if previous is None else {"previous": previous}
    frozen = fitting.same_frozen({**held, **{update.client: update.adapter for update in updates}})
    if frozen:
        updates = [replace(update, adapter=fitting.without_frozen(update.adapter)) for update in updates]
        previous = previous and fitting.without_frozen(previous)
        clients = {update.client: outline(update.adapter) for update in updates}
    everyone = clients if previous is None else {"previous": outline(previous), **clients}
    names = sorted(fitting.named(everyone, absent))
    for name in names:
        fitting.same_shape(name, {client: adapter for client, adapter in everyone.items() if name in adapter.layers})
    tensors = fitting.same_tensors(everyone)
    fitting.same_options(everyone)
    if not allow_different_base:
        fitting.same_base(everyone)
    for update in updates:
        if not is_stored(update.adapter):
            fitting.all_finite(update)
    dtypes = [layer.A.dtype for adapter in everyone.values() for layer in adapter.layers.values()]
    fitting.check_global_rank(rank, method, clients, previous)
    config = next(iter(clients.values())).config
    return Merge(
        method=method,
        updates=sorted(updates, key=lambda update: update.client),
        previous=previous,
        scaling=scaling or infer_scaling(clients if absent == "refused" else everyone),
        seed=seed,
        dtype=functools.reduce(torch.promote_types, dtypes),
        outline={name: next(a.layers[name] for a in everyone.values() if name in a.layers) for name in names},
        tensors=tensors,
        config=config if absent == "refused" else fitting.of_all_layers(config, names),
        frozen=frozen,
        rank=rank,
    )


def outline_ranks(updates: Sequence[ClientUpdate]) -> Iterator[int]:
    """The ranks of all clients' layers."""
    for update in updates:
        yield from outline(update.adapter).ranks.values()


_ANY_RANK = 1024  # is taken, whatever the layers; a larger one only where a layer, or a client, is as large


def check_rank(rank: Any, known: Iterable[int]) -> None:
    """Raise `AdapterError` for a rank that is none, or for which memory would be asked that no adapter needs."""
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"ranks: expected ranks of at least 1, got {shortened(repr(rank), 50)}")
    if rank > (most := max(_ANY_RANK, *known)):
        raise AdapterError(f"ranks: expected ranks of at most {most}, got {rank}; no layer has a side as long as that")


def infer_scaling(clients: Mapping[str, Adapter]) -> Scaling:
    """The rule that explains all clients' scalings, layer by layer: alpha / r, alpha / sqrt(r), or one constant.

    If no rule does (for example, alpha differs between clients of one rank), shares use the mean of the clients' scalings: a
    share's product is correct under any scaling, and the adapter's own config records the one that was used.
    """
    names = sorted({name for adapter in clients.values() for name in adapter.layers})
    owned = {name: [a.layers[name] for a in clients.values() if name in a.layers] for name in names}
    observed = {name: [(layer.rank, layer.scaling) for layer in layers] for name, layers in owned.items()}
    candidates = {
        "standard": lambda rank, scaling: scaling * rank,
        "rslora": lambda rank, scaling: scaling * rank**0.5,
        "constant": lambda rank, scaling: scaling,
    }
    for rule, alpha_of in candidates.items():
        alphas = {name: [alpha_of(*pair) for pair in pairs] for name, pairs in observed.items()}
        if all(max(values) - min(values) <= 1e-9 * max(values) for values in alphas.values()):
            layer_alpha = {name: values[0] for name, values in alphas.items()}
            return Scaling(layer_alpha[names[0]], rule, layer_alpha)
    means = {name: sum(scaling for _, scaling in pairs) / len(pairs) for name, pairs in observed.items()}
    return Scaling(means[names[0]], "constant", means)


def _nbytes(layer: LoraLayer) -> int:
    return sum(factor.numel() * factor.element_size() for factor in (layer.A, layer.B))
