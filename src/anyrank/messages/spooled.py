"""Adapters that lie in a spool: each layer is read when it is asked for, and memory holds no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from anyrank import files
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.lazy import Lazy, outlined
from anyrank.messages import calls, wire
from anyrank.messages import spool as spools
from anyrank.messages.body import NAMES, TYPES, numbers, tensor_of
from anyrank.messages.frame import Frame
from anyrank.messages.records import ClientUpdate, Download, Failure
from anyrank.messages.spool import Place, Spool, Spooled, failure

_ROOM = 1 << 20  # bytes of a reply's header beside its entries for arrays: metrics, counts, a reason
_ENTRY = 200  # bytes of an entry beside the array's name: its type, its sides, punctuation


class Kept(Lazy[LoraLayer]):
    """Layers of which some factors, or all, lie in `spool`. A layer that is set is written there at once."""

    def __init__(self, spool: Spool, entries: Mapping[str, _Entry] | None = None) -> None:
        self.spool, self._entries = spool, dict(entries or {})
        super().__init__({name: entry.outline for name, entry in self._entries.items()}, self._entries.__getitem__)

    def __setitem__(self, name: str, layer: LoraLayer) -> None:
        with files.naming(self.spool.path):
            self._entries[name] = _Entry(_shapes(layer), _put(self.spool, layer.A), _put(self.spool, layer.B))
        self.outline[name] = self._entries[name].outline

    def __getitem__(self, name: str) -> LoraLayer:
        # Not by a method that is handed to `Lazy`: the circle would keep the spool, and its place on the disk, after the round.
        outline, *factors = self._entries[name]
        A, B = (_taken(self.spool, factor) for factor in factors)
        return LoraLayer(A, B, outline.scaling, outline.kind, outline.kernel)


class _Entry(NamedTuple):
    """A layer's shapes, and where its factors are."""

    outline: LoraLayer
    A: Place | Tensor
    B: Place | Tensor


def is_kept(adapter: Adapter) -> bool:
    """Whether the layers lie in a spool of this server's."""
    return type(adapter.layers) is Kept


def spool_of(updates: Iterable[ClientUpdate]) -> Spool | None:
    """The spool of the first of these updates that lies in one."""
    return next((update.adapter.layers.spool for update in updates if is_kept(update.adapter)), None)


def layers_in(spool: Spool | None) -> dict[str, LoraLayer] | Kept:
    """No layers yet: those that are set are held in memory, or written to the spool if there is one.

    Setting one raises `RunFailed`, in one line, where the disk is full.
    """
    return {} if spool is None else Kept(spool)


def shelved(adapter: Adapter, spool: Spool | None) -> Adapter:
    """The adapter with its layers and tensors in `spool`, if there is one."""
    if spool is None:
        return adapter
    layers = Kept(spool)
    for name, layer in adapter.layers.items():
        layers[name] = layer
    with files.naming(spool.path):
        tensors = _lazy(spool, {name: _put(spool, tensor) for name, tensor in adapter.tensors.items()})
    return replace(adapter, layers=layers, tensors=tensors)


def rebuilt(like: Adapter, make: Callable[[str], LoraLayer], names: Iterable[str] | None = None) -> Mapping[str, LoraLayer]:
    """`{name: make(name)}` for the layers of `like`, or those of `names` in that order. Where those of `like` lie in a spool,
    so do the new ones."""
    layers = layers_in(like.layers.spool if is_kept(like) else None)
    for name in like.layers if names is None else names:
        layers[name] = make(name)
    return layers


# --- replies ---------------------------------------------------------------------------------------------------------


def reply_limit(download: Download) -> int:
    """The most bytes that the frame of a reply to `download` may have."""
    names = [f"{factor}/{name}" for name in download.adapter.layers for factor in download.train - download.private]
    names += [f"tensor/{name}" for name in download.adapter.tensors]
    return download.upload_bytes() + _ROOM + sum(len(json.dumps(name)) + _ENTRY for name in names)


def reply_of(frame: Frame | Spooled, download: Download) -> ClientUpdate | Failure:
    """The reply to a job, as `wire.reply_of` has it; the large factors of one in a spool stay there.

    What the client did not send comes from the download, and is put into the spool too, so that the download is not held.
    """
    if not isinstance(frame, Spooled):
        return wire.reply_of(frame, download)
    reply = wire.reply_of(frame, replace(download, adapter=_without_numbers(download.adapter)))
    if isinstance(reply, Failure):
        return reply
    try:
        layers, tensors = (dict(sorted(each.items())) for each in (reply.adapter.layers, reply.adapter.tensors))  # as guarded
        shapes = Adapter(layers, tensors, reply.adapter.config)
        return replace(reply, adapter=_adapter(frame, shapes, download.adapter))
    except OSError as error:
        return wire.failure_of(failure(frame.header, error))


def _without_numbers(adapter: Adapter) -> Adapter:
    layers = {name: _shapes(layer) for name, layer in outlined(adapter.layers).items()}
    return replace(adapter, layers=layers, tensors={name: each.to("meta") for name, each in outlined(adapter.tensors).items()})


def adapter_of(frame: Frame | Spooled) -> Adapter:
    """The adapter in a frame, as `calls.adapter_of` has it; the large factors of one in a spool stay there."""
    adapter, _ = calls.adapter_of(frame)
    return _adapter(frame, adapter, adapter) if isinstance(frame, Spooled) else adapter


def _adapter(frame: Spooled, shapes: Adapter, sent: Adapter) -> Adapter:
    """The adapter of a frame whose spooled tensors have no numbers yet; what the frame does not have comes from `sent`."""

    def place(name: str, tensor: Tensor, own: Callable[[], Tensor]) -> Place | Tensor:
        if tensor.device.type != "meta":
            return tensor
        found = frame.arrays.get(name)
        return found if isinstance(found, Place) else _put(frame.spool, own())

    entries, tensors = {}, {}
    for name, layer in shapes.layers.items():
        own = partial(_first_slices, sent.layers, name, layer.rank)
        factors = (place(f"{factor}/{name}", getattr(layer, factor), partial(own, factor)) for factor in "AB")
        entries[name] = _Entry(_shapes(layer), *factors)
    for name, tensor in shapes.tensors.items():
        tensors[name] = place(f"tensor/{name}", tensor, partial(sent.tensors.__getitem__, name))
    return Adapter(Kept(frame.spool, entries), _lazy(frame.spool, tensors), shapes.config)


def _first_slices(layers: Mapping[str, LoraLayer], name: str, rank: int, factor: str) -> Tensor:
    layer = layers[name]
    return layer.A[:rank] if factor == "A" else layer.B[:, :rank]


# --- single tensors --------------------------------------------------------------------------------------------------


def _shapes(layer: LoraLayer) -> LoraLayer:
    return replace(layer, A=layer.A.to("meta"), B=layer.B.to("meta"))


def _put(spool: Spool, tensor: Tensor) -> Place | Tensor:
    """A tensor in the spool; a small one in memory of its own."""
    return tensor.detach().clone() if tensor.nbytes < spools.LEAST else spool.keep(NAMES[tensor.dtype], numbers(tensor))


def _taken(spool: Spool, held: Place | Tensor) -> Tensor:
    return tensor_of(spool.take(held), TYPES[held.dtype]) if isinstance(held, Place) else held


def _lazy(spool: Spool, held: Mapping[str, Place | Tensor]) -> Mapping[str, Tensor]:
    shapes = {name: _outline(each) for name, each in held.items()}
    return Lazy(shapes, lambda name: _taken(spool, held[name]))


def _outline(held: Place | Tensor) -> Tensor:
    if not isinstance(held, Place):
        return held.to("meta")
    return torch.empty(held.shape, dtype=TYPES[held.dtype], device="meta")
