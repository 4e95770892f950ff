"""Take, reorder and add slices of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from anyrank import keys
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.lazy import Lazy, outlined
from anyrank.messages.records import Scaling, ServerState
from anyrank.messages.spooled import rebuilt

# --- other slices than the first -------------------------------------------------------------------------------------


def layer_by_layer(
    state: ServerState, make: Callable[[ServerState, str], LoraLayer], names: Iterable[str] | None = None
) -> Mapping[str, LoraLayer]:
    """`{name: make(state, name)}` for the layers of `state`, or those of `names`.

    Where the state's layers are read when they are asked for, the new ones are made when they are asked for.
    """
    names = list(state.adapter.layers if names is None else names)
    if not isinstance(state.adapter.layers, Lazy):
        return {name: make(state, name) for name in names}
    shapes = replace(state, adapter=replace(state.adapter, layers=outlined(state.adapter.layers)))
    return Lazy({name: make(shapes, name) for name in names}, partial(make, state))


def slice_order(state: ServerState, name: str, client: str, rank: int, drawn: bool) -> list[int]:
    """The server's slices of a layer, in an order that starts with those that `client` trains in the round after `state`.

    These are the first `rank` slices, or, if `drawn`, as many drawn without replacement by seed, round, client and layer. The
    draw follows from the state, so it does not have to be stored or sent.
    """
    every = range(outlined(state.adapter.layers)[name].rank)
    own = every[:rank]
    if drawn:
        own = keys.rng(state.seed, "slices", state.round, client, name).choice(len(every), len(own), replace=False).tolist()
    return [*sorted(own), *sorted(set(every) - set(own))]


def reordered(state: ServerState, order: Mapping[str, Sequence[int]]) -> ServerState:
    """`state` with its slices in that order, layer by layer."""
    layers = layer_by_layer(state, lambda held, name: take(held.adapter.layers[name], order[name]))
    return replace(state, adapter=replace(state.adapter, layers=layers))


def times(factor: Tensor, number: float) -> Tensor:
    """`factor * number`; a factor that has a shape and no numbers stays as it is."""
    return factor if factor.device.type == "meta" else factor * number


def _bare(layer: LoraLayer, rank: int) -> LoraLayer | None:
    """If `layer` has shapes and no numbers, the same at another rank. torch's own operations on such tensors load its compiler,
    which takes 70 MB and a second."""
    if layer.A.device.type != "meta":
        return None
    out, width = layer.shape
    return layer.with_factors(layer.A.new_zeros(rank, width), layer.B.new_zeros(out, rank))


def take(layer: LoraLayer, slices: Sequence[int]) -> LoraLayer:
    """The named slices of a layer, in that order."""
    if list(slices) == list(range(layer.rank)):
        return layer
    return _bare(layer, len(slices)) or layer.with_factors(layer.A[slices], layer.B[:, slices])


def frozen_rest(state: ServerState, ranks: Mapping[str, int]) -> Adapter | None:
    """The nonzero slices past `ranks`, as a sum that a client adds to its base model; `None` if there are none."""
    alive = {}
    for name, layer in state.adapter.layers.items():
        applies = (layer.A.any(dim=1) & layer.B.any(dim=0)).tolist()
        alive[name] = [j for j in range(ranks[name], layer.rank) if applies[j]]
    names = [name for name in alive if alive[name]]
    rest = layer_by_layer(state, lambda held, name: take(held.adapter.layers[name], alive[name]), names)
    return Adapter(rest, {}, state.adapter.config) if rest else None


def widened(adapter: Adapter, rank: int, scaling: Scaling, seed: int) -> Adapter:
    """The untrained `adapter` at `rank` (or its own, if larger), limited in each layer by the layer's shape."""

    def wide(name: str) -> LoraLayer:
        layer = adapter.layers[name]
        layer = pad(layer, min(rank, *layer.shape), seed, "fresh", 0, name)
        return replace(layer, scaling=scaling.of(name, layer.rank))

    return replace(adapter, layers=rebuilt(adapter, wide))


def pad(layer: LoraLayer, rank: int, seed: int, *names: str | int) -> LoraLayer:
    """`layer` extended to `rank` by slices that change nothing but can be trained: B zero, A drawn by the key of `names`."""
    missing = rank - layer.rank
    if missing <= 0:
        return layer
    if bare := _bare(layer, rank):
        return bare
    fresh = init_a(missing, layer, keys.generator(seed, *names))
    A = torch.cat([layer.A, fresh])
    B = torch.cat([layer.B, layer.B.new_zeros(layer.B.shape[0], missing)], dim=1)
    return layer.with_factors(A, B)


def init_a(rank: int, like: LoraLayer, generator: torch.Generator) -> Tensor:
    """PEFT's own start of A: uniform within `1/sqrt(in)` (Kaiming with a = sqrt 5), `[rank, in]`, in `like`'s dtype."""
    width = like.A.shape[1]
    draw = torch.rand(rank, width, generator=generator, dtype=torch.float64) * 2 - 1
    return (draw / math.sqrt(width)).to(like.A.dtype).to(like.A.device)
