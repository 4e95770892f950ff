"""Whether adapters fit together: their names, layers, shapes, ranks, options and base models, before any number is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anyrank.adapter import options
from anyrank.adapter.adapter import Adapter, iter_names
from anyrank.adapter.layer import LoraLayer, finite
from anyrank.adapter.lazy import Lazy, outlined
from anyrank.adapter.names import is_frozen
from anyrank.adapter.stored import open_adapter
from anyrank.errors import AdapterError, MethodError
from anyrank.messages.records import BOTH, ClientUpdate
from anyrank.methods import Method
from anyrank.methods.registry import taking_mixed_ranks


def update(update: Any, position: int) -> ClientUpdate:
    if isinstance(update, ClientUpdate):
        return update if update.client else replace(update, client=f"client-{position}")
    if isinstance(update, (str, os.PathLike)):
        return ClientUpdate(open_adapter(update), 1, os.fspath(update))
    raise AdapterError(f"aggregate: expected ClientUpdates or adapter folders, got a {type(update).__name__} at {position}")


def distinct(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise AdapterError(f"aggregate: client {twice} occurs twice; give each update its own client name")


def mergeable(method: Method, stored: bool) -> None:
    if method.private:
        kept = ", ".join(sorted(method.private))
        raise MethodError(
            f"{method.name}: its clients keep {kept} for themselves, so there is no common adapter; "
            "use a method that merges, such as raflora or rbla"
        )
    if method.pools_data:
        raise MethodError(f"{method.name}: it trains on all data in one place, so there are no adapters to merge; use fedavg")
    if stored and not method.by_layer:
        raise MethodError(
            f"{method.name}: it has its own `aggregate`, which may need all layers at once; "
            "load the adapters (ClientUpdate(Adapter.load(folder), ...)), or write its rule for one layer"
        )


def one_rank(method: Method, clients: Mapping[str, Adapter]) -> None:
    for name in sorted({name for adapter in clients.values() for name in adapter.layers}):
        ranks = sorted({adapter.layers[name].rank for adapter in clients.values() if name in adapter.layers})
        if len(ranks) > 1:
            raise MethodError(
                f"{method.name}: expected clients of one rank, got ranks {', '.join(map(str, ranks))} in layer {name}; "
                f"give all clients one rank, or use a method that takes mixed ranks: {taking_mixed_ranks()}"
            )


ABSENT = ("refused", "silent")


def named(adapters: Mapping[str, Adapter], absent: str) -> Iterable[str]:
    """The layers that are merged: those of all adapters, which must be the same, or those of any."""
    if absent not in ABSENT:
        raise AdapterError(f"absent: expected one of {', '.join(ABSENT)}, got {absent!r}")
    if absent == "silent":
        return {name for adapter in adapters.values() for name in adapter.layers}
    return iter_names(adapters)


def of_all_layers(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The first client's configuration, for an adapter of the layers of all: they are listed by name."""
    chosen = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    return {**config, **chosen, "target_modules": list(names)}


def check_global_rank(rank: int, method: Method, clients: Mapping[str, Adapter], previous: Adapter | None) -> None:
    if not rank:
        return
    layers = sorted({name for adapter in clients.values() for name in adapter.layers})
    owned = {name: [a.layers[name].rank for a in clients.values() if name in a.layers] for name in layers}
    largest, most = max(map(max, owned.values())), max(map(sum, owned.values()))
    if type(rank) is not int or not largest <= rank <= most:
        raise AdapterError(
            f"rank: expected a rank from {largest}, the clients' largest, to {most}, the sum of their ranks, got {rank!r}"
        )
    if previous is not None:
        raise AdapterError("rank: the result has the rank of previous; leave one of them out")
    if method.train != BOTH or not method.traits.mixed_ranks:
        raise MethodError(f"{method.name}: its result has the rank of its clients; leave rank out, or use another method")


def same_shape(name: str, clients: Mapping[str, Adapter]) -> None:
    (first, adapter), *others = clients.items()
    for other, theirs in others:
        a, b = adapter.layers[name], theirs.layers[name]
        if a.shape != b.shape or a.kind != b.kind or a.kernel != b.kernel:
            raise AdapterError(
                f"layer {name}: {first} has {a.kind} [out, in] {list(a.shape)}, {other} has {b.kind} {list(b.shape)}; "
                "all clients must adapt the same base model"
            )


def same_tensors(clients: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """`{name: outline}` of all plain tensors, each with the widest dtype that a client has it in."""
    found: dict[str, tuple[str, Tensor]] = {}
    for client, adapter in clients.items():
        for name, tensor in adapter.tensors.items():
            first, known = found.setdefault(name, (client, tensor))
            if known.shape != tensor.shape:
                raise AdapterError(
                    f"{name}: {first} has shape {list(known.shape)}, {client} has {list(tensor.shape)}; "
                    "all clients must train the same head"
                )
            dtype = torch.promote_types(known.dtype, tensor.dtype)
            found[name] = first, torch.empty(tensor.shape, dtype=dtype, device="meta")
    return {name: found[name][1] for name in sorted(found)}


def same_frozen(adapters: Mapping[str, Adapter]) -> Mapping[str, Tensor]:
    """`{name: tensor}`, read when it is asked for, of the base weights that PEFT saved with adapters, one of each."""
    found: dict[str, str] = {}
    for client, adapter in adapters.items():
        for name in filter(is_frozen, adapter.tensors):
            known = adapters[found.setdefault(name, client)].tensors[name]
            if found[name] != client and not torch.equal(known, adapter.tensors[name]):
                raise AdapterError(
                    f"{name}: {found[name]} and {client} have different base weights below the layer that they adapt (a "
                    "vocabulary that each of them enlarged?); train all from one saved base model"
                )
    shapes = {name: outlined(adapters[client].tensors)[name] for name, client in found.items()}
    return Lazy(shapes, lambda name: adapters[found[name]].tensors[name])


def without_frozen(adapter: Adapter) -> Adapter:
    trained = {name: tensor for name, tensor in outlined(adapter.tensors).items() if not is_frozen(name)}
    if isinstance(adapter.tensors, Lazy):
        return replace(adapter, tensors=Lazy(trained, adapter.tensors.__getitem__))
    return replace(adapter, tensors=trained)


def same_options(clients: Mapping[str, Adapter]) -> None:
    if found := options.differing({client: adapter.config for client, adapter in clients.items()}):
        key, first, other = found
        raise AdapterError(f"{key}: {first} has another value than {other}; merge adapters that were trained with the same one")


def same_base(clients: Mapping[str, Adapter]) -> None:
    known = {client: adapter.config.get("base_model_name_or_path") for client, adapter in clients.items()}
    named = [(client, base) for client, base in known.items() if base]
    for client, base in named[1:]:
        if base != named[0][1]:
            raise AdapterError(
                f"base model: {named[0][0]} was trained on {named[0][1]}, {client} on {base}; merge adapters of one model, or, "
                "if these are two names of one model, allow it (--allow-different-base, allow_different_base=True)"
            )


def all_finite(update: ClientUpdate) -> None:
    for name, layer in update.adapter.layers.items():
        finite(layer.A, f"client {update.client}", name)
        finite(layer.B, f"client {update.client}", name)
    for name, tensor in update.adapter.tensors.items():
        finite(tensor, f"client {update.client}", name)


def common_a(method: Method, name: str, sent: Mapping[str, LoraLayer], largest: LoraLayer) -> None:
    for client, layer in sent.items():
        if not torch.equal(layer.A.to(largest.A.dtype), largest.A[: layer.rank]):
            raise MethodError(
                f"{method.name}: needs one A for all clients, but {client}'s A differs in layer {name}; "
                "use a method that merges products, such as raflora or flexlora"
            )
