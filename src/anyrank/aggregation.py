"""Merging adapters of any ranks without training: one function, for a folder of PEFT adapters or for your own loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anyrank import collapse, methods
from anyrank.adapter import Adapter, LoraLayer, iter_names
from anyrank.errors import AdapterError, MethodError
from anyrank.methods import Method
from anyrank.records import BOTH, Client, ClientUpdate, Scaling, ServerState


@dataclass(frozen=True)
class AggregateResult:
    """The merged update: as a whole, as the share of any rank, and as what goes into the base model."""

    method: Method
    state: ServerState

    @property
    def adapter(self) -> Adapter:
        """The whole global update, at the largest rank of the clients."""
        return self.state.adapter

    @property
    def base_update(self) -> Adapter | None:
        """The part to merge into the frozen base model, for the methods that have one."""
        return self.state.merged

    def share(self, rank: int) -> Adapter:
        """What a client of `rank` gets to start its next round from."""
        if not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"share: expected a rank of at least 1, got {rank!r}")
        return self.method.dispatch(self.state, Client(f"rank-{rank}", rank)).adapter

    def spectrum(self) -> dict[str, Tensor]:
        """`{layer: singular values of the global update}`, falling, float64."""
        return collapse.spectra(self.state.adapter)


def aggregate(
    updates: Iterable[ClientUpdate | str | os.PathLike[str]],
    method: str | Method,
    previous: Adapter | None = None,
    seed: int = 0,
    scaling: Scaling | None = None,
    **options: Any,
) -> AggregateResult:
    """Merge the clients' adapters by `method`; `options` are the method's own.

    `updates`: `ClientUpdate`s, or PEFT adapter folders (then all clients weigh the same). `previous`: the global adapter
    that the clients started from, for methods that keep what no client of this round has. `scaling`: the rule that shares
    use; by default the one that explains the clients' own scalings.

    >>> one = Adapter({"layer": LoraLayer(torch.eye(1, 2), torch.ones(2, 1), 1.0)})
    >>> two = Adapter({"layer": LoraLayer(torch.eye(2), torch.eye(2), 1.0)})
    >>> merged = aggregate([ClientUpdate(one, 3, "a"), ClientUpdate(two, 1, "b")], method="raflora")
    >>> merged.adapter.ranks, merged.share(rank=1).ranks
    ({'layer': 2}, {'layer': 1})
    """
    updates = [_update(update, position) for position, update in enumerate(updates, 1)]
    if not updates:
        raise AdapterError("aggregate: expected at least one client's adapter, got none")
    _distinct([update.client for update in updates])
    method = methods.make(method, options) if isinstance(method, str) else method
    clients = {update.client: update.adapter for update in updates}
    scaling = scaling or infer_scaling(clients)
    state = ServerState(0, seed, _server_adapter(method, clients, previous, scaling), scaling)
    return AggregateResult(method, method.aggregate(state, updates))


def infer_scaling(clients: Mapping[str, Adapter]) -> Scaling:
    """The rule that explains all clients' scalings, layer by layer: alpha / r, alpha / sqrt(r), or one constant.

    Where none does (say, alpha differs between clients of one rank), shares use the mean of the clients' scalings: a
    share's product is right under any scaling, and the adapter's own config carries the one that was used.
    """
    names = list(iter_names(clients))
    observed = {name: [(a.layers[name].rank, a.layers[name].scaling) for a in clients.values()] for name in names}
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


def _update(update: Any, position: int) -> ClientUpdate:
    if isinstance(update, ClientUpdate):
        return update if update.client else replace(update, client=f"client-{position}")
    if isinstance(update, (str, os.PathLike)):
        return ClientUpdate(Adapter.load(update), 1, os.fspath(update))
    raise AdapterError(f"aggregate: expected ClientUpdates or adapter folders, got a {type(update).__name__} at {position}")


def _distinct(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise AdapterError(f"aggregate: client {twice} is named twice; give each update its own client name")


def _server_adapter(method: Method, clients: Mapping[str, Adapter], previous: Adapter | None, scaling: Scaling) -> Adapter:
    """The adapter that the server held before: `previous`, or nothing learned yet, at the clients' largest ranks."""
    if previous is not None:
        _ = list(iter_names({"previous": previous, **clients}))
    layers = {}
    for name in iter_names(clients):
        _same_shape(name, clients)
        largest = max((adapter.layers[name] for adapter in clients.values()), key=lambda layer: layer.rank)
        if method.train != BOTH:
            _common_a(method, name, clients, largest)
        held = previous.layers[name] if previous else largest.with_factors(largest.A, torch.zeros_like(largest.B))
        if held.rank < largest.rank:
            A = torch.cat([held.A, largest.A[held.rank :]])
            B = torch.cat([held.B, held.B.new_zeros(held.B.shape[0], largest.rank - held.rank)], dim=1)
            held = held.with_factors(A, B)
        if previous is None:
            held = held.with_factors(held.A, held.B, scaling.of(name, held.rank))
        layers[name] = held
    first = next(iter(clients.values()))
    return Adapter(layers, previous.tensors if previous else {}, first.config)


def _same_shape(name: str, clients: Mapping[str, Adapter]) -> None:
    (first, adapter), *others = clients.items()
    for other, theirs in others:
        a, b = adapter.layers[name], theirs.layers[name]
        if a.shape != b.shape or a.kind != b.kind or a.kernel != b.kernel:
            raise AdapterError(
                f"layer {name}: {first} has {a.kind} [out, in] {list(a.shape)}, {other} has {b.kind} {list(b.shape)}; "
                "all clients must adapt the same base model"
            )


def _common_a(method: Method, name: str, clients: Mapping[str, Adapter], largest: LoraLayer) -> None:
    for client, adapter in clients.items():
        A = adapter.layers[name].A
        if not torch.equal(A.to(largest.A.dtype), largest.A[: len(A)]):
            raise MethodError(
                f"{method.name}: needs one A for all clients, but {client}'s A differs in layer {name}; "
                "use a method that merges products, such as raflora or flexlora"
            )
